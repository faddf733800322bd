"""The rows of a chunk, cast and checked, in frames of bounded size; and small files whole."""

from collections.abc import Iterator

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.config import PrepareConfig
from data_pipeline.errors import GenattError
from data_pipeline.readers import parquet, text
from data_pipeline.readers.access import opened, reading
from data_pipeline.readers.checks import Checker
from data_pipeline.readers.columns import path_column, used
from data_pipeline.readers.plan import Chunk, Plan
from data_pipeline.sources import SourceFile

FILE_STRIDE = 1 << 40  # position = file number * FILE_STRIDE + row in the file


def read_chunk(plan: Plan, chunk: Chunk, config: PrepareConfig) -> Iterator[pl.DataFrame]:
    """The chunk's rows in file order, in frames of at most `config.rows_per_block` rows.

    Yields
    ------
    user_id, item_id (Int64 or String), timestamp Int64 in `plan.time_unit`, position Int64, and event String (null
    where the row has none) if there is an event column.

    Raises
    ------
    GenattError
        Damaged or changed file; nulls, NaN, values that are not of the column's kind, or times in another unit than
        the source's.
    """
    file = plan.files[chunk.file]
    names = used(config)
    own = [name for name in names.values() if name not in chunk.from_path]
    if file.format == "parquet":
        frames = parquet.frames(file, chunk.row_groups, own, chunk.ranges, config.rows_per_block)
    else:
        frames = text.frames(file, own, config.rows_per_block)
    row = chunk.first_row
    told = (plan.time_unit, plan.time_told)
    for raw in frames:
        raw = raw.with_columns(path_column(file, name, raw.height) for name in chunk.from_path)
        check = Checker(file.label, row)
        position = pl.int_range(raw.height, dtype=pl.Int64, eager=True) + (chunk.file * FILE_STRIDE + row)
        timestamp = position
        if "time" in names:
            timestamp = check.times(raw[names["time"]], plan.kinds.time, plan.time_unit)
            if plan.kinds.time == "number" and config.time_unit == "auto":
                told = check.one_unit(timestamp, names["time"], told)
        columns = {
            "user_id": check.ids(raw[names["user"]], plan.kinds.user),
            "item_id": check.ids(raw[names["item"]], plan.kinds.item),
            "timestamp": timestamp,
            "position": position,
        }
        if "event" in names:
            columns["event"] = check.events(raw[names["event"]])
        yield pl.DataFrame([column.alias(name) for name, column in columns.items()])
        row += raw.height
    if chunk.rows not in (None, row - chunk.first_row):
        raise GenattError(
            f"{file.label} had {chunk.rows} rows here when it was looked at, and has {row - chunk.first_row} now: "
            "let nothing change the source while it is prepared"
        )


def read_table(file: SourceFile, text: str) -> pa.Table:
    """A whole file, all columns in their own types; of CSV, the column `text` is kept as written."""
    with opened(file) as stream, reading(file):
        if file.format == "parquet":
            return pq.read_table(stream)
        content = stream.read()
        if file.format == "jsonl":
            frame = pl.read_ndjson(content, infer_schema_length=None)
        else:
            frame = pl.read_csv(
                content, separator=file.separator, infer_schema_length=None, schema_overrides={text: pl.String}
            )
        return frame.to_arrow(compat_level=pl.CompatLevel.oldest())
