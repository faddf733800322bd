"""Raw files to checked columns: which columns and types there are, before any work starts, and a chunk of rows read.

A row read is `user_id` (int64 or string), `item_id` (int64 or string), `timestamp` int64 and `position` int64, its
place in the whole source. All of them are free of nulls, or there is a `GenattError` that names file, column and row.
"""

import difflib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import BinaryIO

import fsspec
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.config import PrepareConfig
from data_pipeline.errors import GenattError
from data_pipeline.sources import Source, SourceFile
from data_pipeline.storage import filesystem, one_line

FILE_STRIDE = 1 << 40  # position = file number * FILE_STRIDE + row in the file
HEAD_BYTES = 1 << 20  # of a CSV file: enough to tell its columns and their kinds
LIBRARY_ERRORS = (OSError, pa.ArrowException, pl.exceptions.PolarsError)


@dataclass(frozen=True)
class Kinds:
    """What the columns hold: ids "int64" or "string"; times "number", "date", "datetime[UNIT]" or "row" (no column)."""

    user: str
    item: str
    time: str


@dataclass(frozen=True)
class Chunk:
    """The rows one task reads: some row groups of a Parquet file, or a whole CSV file."""

    file: int
    row_groups: tuple[int, ...] = ()
    first_row: int = 0


@dataclass(frozen=True)
class Plan:
    """Everything known before the data is read."""

    files: tuple[SourceFile, ...]
    kinds: Kinds
    chunks: tuple[Chunk, ...]


def plan(source: Source, config: PrepareConfig) -> Plan:
    """Looks at every file's footer or head: are the columns there, are their types usable, and the same in all files?

    Raises
    ------
    GenattError
        Unreadable file, missing column, unusable type, or types that differ between files.
    """
    with ThreadPoolExecutor(16) as pool:  # remote footers: waiting, not computing
        looked = list(pool.map(lambda file: _look(file, config), source.files))
    first: tuple[SourceFile, Kinds] | None = None
    chunks: list[Chunk] = []
    for number, (file, (kinds, rows)) in enumerate(zip(source.files, looked, strict=True)):
        if kinds is None:  # no rows, so no say
            continue
        first = first or (file, kinds)
        for column in ("user", "item", "time"):
            expected, found = getattr(first[1], column), getattr(kinds, column)
            if found != expected:
                name, mend = getattr(config, f"{column}_column"), "" if column == "time" else ", or set id_type=string"
                raise GenattError(
                    f"column {name!r} has mixed types: {expected} in {first[0].label}, {found} in {file.label}: "
                    f"write both with one type{mend}"
                )
        chunks.extend([Chunk(number)] if file.format == "csv" else _group(number, rows, config.rows_per_block))
    if first is None:
        raise GenattError(f"source {source.name} has no rows in its {len(source.files)} file(s): nothing to prepare")
    return Plan(source.files, first[1], tuple(chunks))


def read_chunk(plan: Plan, chunk: Chunk, config: PrepareConfig) -> pl.DataFrame:
    """The chunk's rows in file order: user_id, item_id, timestamp, position.

    Raises
    ------
    GenattError
        Damaged file; nulls, NaN, or values that are not of the column's kind.
    """
    file = plan.files[chunk.file]
    names = _column_names(config)
    if file.format == "parquet":
        with _opened(file) as stream:
            arrow = pq.ParquetFile(stream).read_row_groups(list(chunk.row_groups), columns=names)
            raw = pl.DataFrame([pl.Series(name, pl.from_arrow(arrow[name])) for name in names])
    else:
        with _opened(file) as stream:
            raw = _read_csv(stream.read(), file, names)
    check = _Checker(file.label, chunk.first_row, raw.height)
    position = pl.int_range(raw.height, dtype=pl.Int64, eager=True) + (chunk.file * FILE_STRIDE + chunk.first_row)
    timestamp = position if config.time_column is None else check.times(raw[config.time_column], plan.kinds.time)
    return pl.DataFrame(
        [
            check.ids(raw[config.user_column], plan.kinds.user).alias("user_id"),
            check.ids(raw[config.item_column], plan.kinds.item).alias("item_id"),
            timestamp.alias("timestamp"),
            position.alias("position"),
        ]
    )


def read_table(file: SourceFile, text: str) -> pa.Table:
    """A whole file, all columns in their own types; of CSV, the column `text` is kept as written."""
    with _opened(file) as stream:
        if file.format == "parquet":
            return pq.read_table(stream)
        frame = pl.read_csv(
            stream.read(), separator=file.separator, infer_schema_length=None, schema_overrides={text: pl.String}
        )
        return frame.to_arrow(compat_level=pl.CompatLevel.oldest())


def missing_column(name: str, option: str, label: str, there: Sequence[str]) -> GenattError:
    """The error for a column that `label` has not: lists those it has and suggests the nearest."""
    near = difflib.get_close_matches(name, there, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return GenattError(f"no column {name!r} in {label}: {hint}it has {', '.join(there)}: set {option}")


def _column_names(config: PrepareConfig) -> list[str]:
    return [name for name in (config.user_column, config.item_column, config.time_column) if name is not None]


def _look(file: SourceFile, config: PrepareConfig) -> tuple[Kinds | None, list[int]]:
    """Kinds of the columns (none without rows), and the rows of each row group (of CSV: the rows of its head)."""
    with _opened(file) as stream:
        if file.format == "parquet":
            footer = pq.ParquetFile(stream)
            schema, metadata = footer.schema_arrow, footer.metadata
            types = dict(zip(schema.names, schema.types, strict=True))
            rows = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        else:
            head = stream.read(HEAD_BYTES)
            whole_lines = head if len(head) < HEAD_BYTES else head[: head.rfind(b"\n") + 1]
            frame = _read_csv(whole_lines, file)
            types, rows = _guess_types(frame, config.time_column), [frame.height]
    for option in ("user_column", "item_column", "time_column"):
        name = getattr(config, option)
        if name is not None and name not in types:
            raise missing_column(name, option, file.label, list(types))

    def id_kind(name: str) -> str:
        type_ = types[name].value_type if pa.types.is_dictionary(types[name]) else types[name]
        if pa.types.is_string(type_) or pa.types.is_large_string(type_) or pa.types.is_string_view(type_):
            return "string"
        if pa.types.is_integer(type_):
            return "int64" if config.id_type == "auto" else "string"
        raise GenattError(
            f"column {name!r} of {file.label} has type {type_}: ids must be integers or strings: cast it first"
        )

    def time_kind(name: str) -> str:
        type_ = types[name]
        if pa.types.is_integer(type_) or pa.types.is_floating(type_):
            return "number"
        if pa.types.is_timestamp(type_):
            return f"datetime[{type_.unit}]"
        if pa.types.is_date(type_):
            return "date"
        raise GenattError(
            f"column {name!r} of {file.label} has type {type_}: times are numbers or datetimes: cast it first"
        )

    if not sum(rows):
        return None, rows
    time = "row" if config.time_column is None else time_kind(config.time_column)
    return Kinds(id_kind(config.user_column), id_kind(config.item_column), time), rows


def _guess_types(head: pl.DataFrame, time_column: str | None) -> dict[str, pa.DataType]:
    """Types of CSV columns. Integers are only what is written like one: `007` stays text, lest it becomes `7`."""

    def guess(column: pl.Series) -> pa.DataType:
        values = column.drop_nulls()
        if (values.cast(pl.Int64, strict=False).cast(pl.String) == values).fill_null(False).all():
            return pa.int64()
        if column.name == time_column and values.cast(pl.Float64, strict=False).is_not_null().all():
            return pa.float64()
        if column.name == time_column and _to_datetime(values).is_not_null().all():
            return pa.timestamp("us")
        return pa.string()

    return {column.name: guess(column) for column in head}


def _group(file: int, rows: list[int], rows_per_block: int) -> Iterator[Chunk]:
    """Chunks of neighbouring row groups with about `rows_per_block` rows together; `rows` is the size of each group."""
    members: list[int] = []
    first_row, held = 0, 0
    for group, count in enumerate(rows):
        members.append(group)
        held += count
        if held >= rows_per_block or group == len(rows) - 1:
            yield Chunk(file, tuple(members), first_row)
            first_row, held, members = first_row + held, 0, []


def _read_csv(content: bytes, file: SourceFile, columns: list[str] | None = None) -> pl.DataFrame:
    return pl.read_csv(content, separator=file.separator, infer_schema=False, columns=columns)


def _to_datetime(values: pl.Series) -> pl.Series:
    return values.str.to_datetime(time_unit="us", strict=False)


@contextmanager
def _opened(file: SourceFile) -> Iterator[BinaryIO]:
    """`file` for reading, unpacked where its name says so; what libraries raise on a damaged file becomes one line."""
    fs, path = filesystem(file.path)
    try:
        with fsspec.core.OpenFile(fs, path, "rb", compression="gzip" if path.endswith(".gz") else None) as stream:
            yield stream
    except LIBRARY_ERRORS as error:
        raise GenattError(
            f"{file.label} is no readable {file.format} file (truncated or damaged?): {one_line(error)}: "
            "write it again, or take it out of the source"
        ) from error


def _whole(numbers: pl.Series) -> pl.Series:
    """As int64, null where `numbers` has a fraction or does not fit."""
    rounded = numbers.cast(pl.Int64, strict=False)
    return pl.select(pl.when(rounded == numbers).then(rounded)).to_series()


@dataclass(frozen=True)
class _Checker:
    """Casts columns of one chunk and refuses what does not fit, naming file, column, count and first row."""

    label: str
    first_row: int
    num_rows: int

    def ids(self, column: pl.Series, kind: str) -> pl.Series:
        self.refuse(column.is_null(), column, "nulls", "remove or fill those rows")
        if kind == "string":
            return column.cast(pl.String)
        numbers = column.cast(pl.Int64, strict=False)
        lossy = numbers.cast(pl.String) != column if column.dtype == pl.String else numbers.is_null()
        self.refuse(lossy.fill_null(True), column, "values that are no 64-bit integer", "set id_type=string")
        return numbers

    def times(self, column: pl.Series, kind: str) -> pl.Series:
        missing = column.is_nan() if column.dtype.is_float() else column.is_null()
        self.refuse(missing.fill_null(True), column, "nulls or NaN", "remove or fill those rows")
        if kind != "number":
            moments = _to_datetime(column) if column.dtype == pl.String else column
            self.refuse(
                moments.is_null(), column, "values that are no date and time", "write them all alike, as ISO 8601"
            )
            return moments.to_physical().cast(pl.Int64)
        if column.dtype == pl.String:
            # Straight to integers where that works: nanoseconds do not fit into a float.
            integers, floats = column.cast(pl.Int64, strict=False), column.cast(pl.Float64, strict=False)
            whole = pl.select(pl.coalesce(integers, _whole(floats))).to_series()
        else:
            whole = _whole(column)
        self.refuse(whole.is_null(), column, "values that are no whole number", "round them or use a finer unit")
        return whole

    def refuse(self, bad: pl.Series, column: pl.Series, what: str, mend: str) -> None:
        if count := int(bad.sum()):
            row = int(bad.arg_max() or 0)
            rows = f"rows {self.first_row} to {self.first_row + self.num_rows - 1}"
            raise GenattError(
                f"column {column.name!r} of {self.label} has {count} {what} in {rows} (counted from 0), "
                f"first {column[row]!r} at row {self.first_row + row}: {mend}"
            )
