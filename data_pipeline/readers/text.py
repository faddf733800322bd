"""CSV and JSON lines: what the head of a file tells, and its rows as a stream.

Types are guessed from the head with care: `007` is text, lest it become 7, and what JSON quotes stays text. Rows are
read with the kinds found, so a later row that does not fit is refused, never bent.
"""

import csv
import io
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import BinaryIO

import polars as pl
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.json as pajson

from data_pipeline.errors import GenattError
from data_pipeline.readers.access import fetch, is_packed, opened, reading
from data_pipeline.readers.checks import refuse_twice, shortened, to_datetime
from data_pipeline.sources import SourceFile

HEAD_BYTES = 1 << 20  # enough to tell the columns and their kinds
BLOCK_BYTES = 1 << 21  # parsed at a time; no row may be longer
END_FIELDS = 4097  # of the row put after a CSV file: more than any file has

CSV_MEND = "close the quotes, and end rows with a line feed"
MIXED_JSON = re.compile(r"Column\(/(.*)\) changed from (\w+) to (\w+)")
OTHER_JSON = re.compile(r"Failed to convert JSON to (\w+), couldn't parse:(.*)")


@dataclass(frozen=True)
class Head:
    """The names of all columns, and the first rows of those asked for, in the types the format has by itself."""

    names: list[str]
    rows: pl.DataFrame


def head(file: SourceFile, columns: Sequence[str]) -> Head:
    """The first rows of `file`; of CSV all is text."""
    (raw,) = fetch(file, [(0, min(file.bytes, HEAD_BYTES))])
    whole = file.bytes <= HEAD_BYTES
    with reading(file):
        if is_packed(file):
            raw, whole = _unpacked(raw, whole)
        return _csv_head(file, raw, whole, columns) if file.format == "csv" else _json_head(file, raw, whole, columns)


def frames(file: SourceFile, columns: Sequence[str], rows: int) -> Iterator[pl.DataFrame]:
    """All rows of `columns` in order, in frames of at most `rows` rows and about `BLOCK_BYTES`."""
    schema = None if file.format == "csv" else _json_schema(head(file, columns).rows)
    with opened(file) as stream, reading(file):
        batches = _csv_batches(stream, file, columns) if schema is None else _json_batches(stream, file, schema)
        for batch in batches:
            yield from pl.DataFrame(batch).iter_slices(rows)


def guess_types(rows: pl.DataFrame, time_column: str | None, quoted: bool = False) -> dict[str, pa.DataType]:
    """Types of the columns of a head. Of text, integers are only what is written like one.

    quoted: text was in quotes where numbers are not, as in JSON: it stays text, but for times.
    """

    def guess(column: pl.Series) -> pa.DataType:
        values = column.drop_nulls()
        if values.is_empty():
            return pa.null()
        if column.dtype != pl.String:
            return _arrow_type(values)
        if quoted and column.name != time_column:
            return pa.string()
        if (values.cast(pl.Int64, strict=False).cast(pl.String) == values).fill_null(False).all():
            return pa.int64()
        if column.name == time_column and values.cast(pl.Float64, strict=False).is_not_null().all():
            return pa.float64()
        if column.name == time_column and to_datetime(values).is_not_null().all():
            return pa.timestamp("us")
        return pa.string()

    return {column.name: guess(column) for column in rows}


def _unpacked(raw: bytes, whole: bool) -> tuple[bytes, bool]:
    """The first `HEAD_BYTES` or less of a gzip file of which `raw` is the head."""
    text = b""
    while raw and len(text) < HEAD_BYTES:  # a gzip file may have several members
        member = zlib.decompressobj(wbits=31)
        try:
            text += member.decompress(raw, HEAD_BYTES - len(text))
        except zlib.error as error:
            raise OSError(f"no gzip: {error}") from error
        if not member.eof:
            return text, False
        raw = member.unused_data
    return text, whole and not raw


def _csv_head(file: SourceFile, raw: bytes, whole: bool, columns: Sequence[str]) -> Head:
    csv.field_size_limit(max(csv.field_size_limit(), HEAD_BYTES))
    raw = raw + b"\n" if whole else raw[: _row_end(raw, file.separator)]
    if not raw:
        raise _endless(file, CSV_MEND)
    text = io.StringIO(raw.decode("utf-8-sig", errors="replace"), newline="")
    names = next((row for row in csv.reader(text, delimiter=file.separator) if row), [])  # not an empty line
    refuse_twice(columns, names, file.label)
    present = [name for name in columns if name in names]
    if not present:
        return Head(names, pl.DataFrame())
    table = pa.Table.from_batches(_csv_batches(pa.BufferReader(raw), file, present), _text_schema(present))
    if not whole and not table.num_rows:
        raise _endless(file, CSV_MEND)
    return Head(names, pl.DataFrame(table))


def _row_end(raw: bytes, separator: str) -> int:
    """Where the last row of CSV begins, which may be cut short. Only a quote that begins a field opens a text."""
    lines = [0]  # where each line ends

    def counted() -> Iterator[str]:
        for line in io.StringIO(raw.decode("latin-1"), newline=""):  # a byte is a character
            lines.append(lines[-1] + len(line))
            yield line

    rows = csv.reader(counted(), delimiter=separator)
    ends = [lines[rows.line_num] for _ in rows]
    return ends[-2] if len(ends) > 1 else 0


def _csv_batches(stream: BinaryIO, file: SourceFile, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    closed = False

    def is_end(row: pacsv.InvalidRow) -> str:
        nonlocal closed
        end = row.actual_columns == END_FIELDS and not row.text.strip(file.separator)
        closed |= end
        return "skip" if end else "error"

    yield from pacsv.open_csv(
        _Ended(stream, f"\n{file.separator * (END_FIELDS - 1)}\n".encode()),
        pacsv.ReadOptions(use_threads=False, block_size=BLOCK_BYTES),
        pacsv.ParseOptions(delimiter=file.separator, newlines_in_values=True, invalid_row_handler=is_end),
        pacsv.ConvertOptions(
            include_columns=list(columns),
            column_types=_text_schema(columns),
            strings_can_be_null=True,
            null_values=[""],
        ),
    )
    if not closed:
        raise GenattError(f"{file.label} ends inside quotes, which hide all rows after them: {CSV_MEND}")


class _Ended(io.RawIOBase):
    """A stream with `end` after its last byte.

    At the end of a file Arrow closes quotes that are still open, and the rows behind them are gone without a word. A
    last row that is in its place shows that none are.
    """

    def __init__(self, stream: BinaryIO, end: bytes) -> None:
        self._stream, self._end = stream, io.BytesIO(end)

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        return self._stream.read(size) or self._end.read(size)


def _text_schema(columns: Sequence[str]) -> pa.Schema:
    return pa.schema([(name, pa.string()) for name in columns])


def _json_head(file: SourceFile, raw: bytes, whole: bool, columns: Sequence[str]) -> Head:
    raw = raw.removeprefix(b"\xef\xbb\xbf")
    if raw.lstrip()[:1] == b"[":
        raise GenattError(
            f"{file.label} is a JSON array: write JSON lines, one object a line, without brackets or commas between"
        )
    if not whole:
        raw = raw[: raw.rfind(b"\n") + 1]
    if not raw.strip():
        if not whole:
            raise _endless(file, "write one object a line")
        return Head([], pl.DataFrame())
    rows = pl.read_ndjson(raw, infer_schema_length=None)
    present = rows.select([name for name in columns if name in rows.columns])
    for column in present:
        if column.dtype in (pl.Int128, pl.UInt64):
            raise GenattError(f"column {column.name!r} of {file.label} holds integers beyond 64 bits: quote them")
    return Head(rows.columns, present)


def _endless(file: SourceFile, mend: str) -> GenattError:
    return GenattError(f"{file.label} has no row that ends within its first {HEAD_BYTES} bytes: {mend}")


def _json_schema(rows: pl.DataFrame) -> pa.Schema:
    """Of a column without a value so far, only text can follow: events are told late, nulls elsewhere are refused."""
    types = ((column.name, _arrow_type(column)) for column in rows)
    return pa.schema([(name, pa.string() if pa.types.is_null(type_) else type_) for name, type_ in types])


def _json_batches(stream: BinaryIO, file: SourceFile, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    try:
        yield from pajson.open_json(
            stream,
            pajson.ReadOptions(use_threads=False, block_size=BLOCK_BYTES),
            pajson.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore"),
        )
    except pa.ArrowInvalid as error:
        if mixed := MIXED_JSON.search(str(error)):
            name, one, other = mixed.groups()
            raise GenattError(
                f"column {name!r} of {file.label} has mixed types: {one} in some rows, {other} in others: "
                "write it with one type"
            ) from error
        if other_kind := OTHER_JSON.search(str(error)):
            kind, value = other_kind.groups()
            names = " or ".join(repr(field.name) for field in schema if str(field.type) == kind)
            raise GenattError(
                f"column {names} of {file.label} has values of type {kind} first, and {shortened(value)} later: "
                "write it with one type"
            ) from error
        raise


def _arrow_type(column: pl.Series) -> pa.DataType:
    type_ = column.head(0).to_arrow(compat_level=pl.CompatLevel.oldest()).type
    return pa.string() if pa.types.is_large_string(type_) else type_
