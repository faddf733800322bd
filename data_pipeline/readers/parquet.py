"""Parquet: what its footer tells before any data is read, and the rows of some row groups.

A remote file costs one request for its footer, and a chunk of it one round of requests at the same time: the footer
again (kept footers of ten thousand wide files would be gigabytes) and the column chunks that are needed.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.readers.access import Parts, Range, fetch, local_path, opened, reading
from data_pipeline.readers.checks import refuse_twice
from data_pipeline.sources import SourceFile

FOOTER_BYTES = 1 << 16  # read from the end of a remote file: holds most footers whole
GAP_BYTES = 1 << 16  # nearer ranges are one request
MEMORY_BYTES = 1 << 27  # a remote chunk larger than this is streamed, not fetched
BUFFER_BYTES = 1 << 23  # of a column that is streamed: the size of a request


@dataclass(frozen=True)
class RowGroup:
    """A row group: its rows, the least and greatest time its statistics tell, and the bytes of the columns needed."""

    rows: int
    times: tuple[int, int] | None
    ranges: tuple[Range, ...]


@dataclass(frozen=True)
class Footer:
    """What a footer tells: types of all columns, and the row groups."""

    types: dict[str, pa.DataType]
    groups: tuple[RowGroup, ...]
    bytes: int


def footer(file: SourceFile, needed: Sequence[str], time: str | None) -> Footer:
    """The footer of `file`, with the byte ranges of the columns `needed` and the statistics of the column `time`.

    Raises
    ------
    GenattError
        Damaged file, or a needed column that is there twice.
    """
    metadata, length = _metadata(file)
    schema = metadata.schema.to_arrow_schema()
    refuse_twice(needed, schema.names, file.label)
    place = {metadata.schema.column(column).path: column for column in range(metadata.num_columns)}
    columns = [place[name] for name in needed if name in place]
    time_type = schema.field(time).type if time in place else None
    groups = []
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        ranges = merged([_range(group.column(column)) for column in columns])
        times = None if time_type is None else _times(group.column(place[time]).statistics, time_type)
        groups.append(RowGroup(group.num_rows, times, ranges))
    return Footer(dict(zip(schema.names, schema.types, strict=True)), tuple(groups), length)


def frames(
    file: SourceFile, groups: Sequence[int], columns: Sequence[str], ranges: Sequence[Range], rows: int
) -> Iterator[pl.DataFrame]:
    """The rows of row `groups`, in order, in frames of at most `rows` rows.

    Parameters
    ----------
    ranges
        Bytes of `file` that hold the columns of those groups and the footer (the last range). Of a file on this
        machine's disks they are not needed.

    Raises
    ------
    GenattError
        Damaged file, or one that changed since its footer was read.
    """
    if path := local_path(file):
        with reading(file), pq.ParquetFile(path, buffer_size=BUFFER_BYTES) as parquet:
            yield from _decoded(parquet, groups, columns, rows)
    elif sum(stop - start for start, stop in ranges) <= MEMORY_BYTES:
        parts = fetch(file, ranges)
        with reading(file):
            metadata = pq.read_metadata(pa.BufferReader(parts[-1]))
            with pq.ParquetFile(Parts(file.bytes, ranges, parts), metadata=metadata) as parquet:
                yield from _decoded(parquet, groups, columns, rows)
    else:
        with opened(file) as stream, reading(file), pq.ParquetFile(stream, buffer_size=BUFFER_BYTES) as parquet:
            yield from _decoded(parquet, groups, columns, rows)


def merged(ranges: Sequence[Range], gap: int = GAP_BYTES) -> tuple[Range, ...]:
    """`ranges` in order, near ones joined."""
    joined: list[Range] = []
    for start, stop in sorted(ranges):
        if joined and start - joined[-1][1] <= gap:
            joined[-1] = (joined[-1][0], max(stop, joined[-1][1]))
        else:
            joined.append((start, stop))
    return tuple(joined)


def _decoded(
    parquet: pq.ParquetFile, groups: Sequence[int], columns: Sequence[str], rows: int
) -> Iterator[pl.DataFrame]:
    for batch in parquet.iter_batches(rows, row_groups=list(groups), columns=list(columns), use_threads=False):
        yield pl.DataFrame([pl.Series(name, pl.from_arrow(batch.column(name))) for name in columns])


def _metadata(file: SourceFile) -> tuple[Any, int]:
    """The parsed footer, and its length in bytes with the eight that end the file."""
    if path := local_path(file):
        with reading(file), pa.OSFile(path) as stream:
            metadata = pq.read_metadata(stream)
            return metadata, metadata.serialized_size + 8
    start = max(0, file.bytes - FOOTER_BYTES)
    (tail,) = fetch(file, [(start, file.bytes)])
    length = int.from_bytes(tail[-8:-4], "little") + 8
    if len(tail) < length <= file.bytes and tail[-4:] == b"PAR1":
        (head,) = fetch(file, [(file.bytes - length, start)])
        tail = head + tail
    with reading(file):
        return pq.read_metadata(pa.BufferReader(tail)), length


def _range(column: Any) -> Range:
    """Where a column chunk lies; its dictionary page, if any, comes first."""
    start = column.data_page_offset
    if column.has_dictionary_page and 0 < column.dictionary_page_offset < start:
        start = column.dictionary_page_offset
    return start, start + column.total_compressed_size


def _times(statistics: Any, type_: pa.DataType) -> tuple[int, int] | None:
    """Least and greatest time as whole numbers in the file's unit, rounded outwards; none where not told."""
    if statistics is None or not statistics.has_min_max:
        return None
    logical = pa.types.is_timestamp(type_) or pa.types.is_date(type_)
    low, high = (statistics.min_raw, statistics.max_raw) if logical else (statistics.min, statistics.max)
    if not all(isinstance(bound, int | float) and math.isfinite(bound) for bound in (low, high)):
        return None
    return math.floor(low), math.ceil(high)
