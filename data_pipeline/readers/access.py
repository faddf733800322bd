"""Bytes of raw files: streams unpacked, ranges fetched together, and library errors turned into one line."""

import io
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import BinaryIO

import polars as pl
import pyarrow as pa
from fsspec.implementations.local import LocalFileSystem

from data_pipeline import storage
from data_pipeline.errors import GenattError
from data_pipeline.redaction import one_line
from data_pipeline.sources import SourceFile
from data_pipeline.storage import filesystem

LIBRARY_ERRORS = (OSError, ValueError, pa.ArrowException, pl.exceptions.PolarsError)

STREAM_BYTES = 1 << 22  # asked for at once where a file is streamed

Range = tuple[int, int]  # start, stop of bytes in a file


@contextmanager
def reading(file: SourceFile) -> Iterator[None]:
    """What libraries raise on a damaged or vanished `file` becomes a `GenattError` that names it."""
    try:
        yield
    except FileNotFoundError as error:
        raise GenattError(
            f"{file.label} was there when the source was listed and is gone now: let nothing change the source "
            "while it is prepared"
        ) from error
    except PermissionError as error:
        raise GenattError(f"{file.label} may not be read: {one_line(error)}: check its permissions") from error
    except LIBRARY_ERRORS as error:
        raise GenattError(
            f"{file.label} is no readable {file.format} file (truncated or damaged?): {one_line(error)}: "
            "write it again, or take it out of the source"
        ) from error


@contextmanager
def opened(file: SourceFile) -> Iterator[BinaryIO]:
    """`file` as a stream, unpacked where its name says so, that holds a bounded part of it in memory."""
    with storage.opened(file.path, STREAM_BYTES) as stream, reading(file):
        yield pa.input_stream(stream, compression="gzip") if is_packed(file) else stream


def is_packed(file: SourceFile) -> bool:
    """Whether `file` is gzip."""
    return file.path.lower().endswith(".gz")


def local_path(file: SourceFile) -> str | None:
    """The path of a file on this machine's disks, which libraries open faster themselves."""
    fs, path = filesystem(file.path)
    return path if isinstance(fs, LocalFileSystem) else None


def fetch(file: SourceFile, ranges: Sequence[Range]) -> list[bytes]:
    """The bytes of `ranges`, fetched at the same time."""
    return storage.read_ranges(file.path, ranges)


class Parts(io.RawIOBase):
    """A file of which only some ranges are here: reads inside one of them work, any other is an error.

    Parquet's decoder asks for whole column chunks at places its footer tells, so the ranges can be fetched at once,
    before it starts, where reading on demand would wait for the store at every column.
    """

    def __init__(self, size: int, ranges: Sequence[Range], parts: Sequence[bytes]) -> None:
        self._size, self._at = size, 0
        self._starts = [start for start, _ in ranges]
        self._parts = [memoryview(part) for part in parts]

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def read(self, size: int = -1) -> bytes:
        stop = self._size if size is None or size < 0 else min(self._size, self._at + size)
        if stop <= self._at:
            return b""
        number = bisect_right(self._starts, self._at) - 1
        offset = self._at - self._starts[number]
        if number < 0 or stop - self._starts[number] > len(self._parts[number]):
            raise OSError(f"bytes {self._at} to {stop} are not where the footer said: did the file change?")
        part = self._parts[number][offset : stop - self._starts[number]]
        self._at = stop
        return bytes(part)
