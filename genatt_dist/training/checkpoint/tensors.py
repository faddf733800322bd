"""Tensors as files in the safetensors format, written and read in blocks, on any storage.

The library's `save_file` wants all tensors in memory at once and `safe_open` a local file; a table's shard of gigabytes
should be neither copied nor downloaded whole for a few of its rows. The format is the library's: eight bytes of length,
a JSON header, the numbers. Nothing in it can be executed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from typing import BinaryIO, NamedTuple

import torch
from torch import Tensor

from data_pipeline.errors import GenattError
from data_pipeline.storage import opened, redact

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_BLOCK_BYTES = 16 << 20
_MOST_HEADER_BYTES = 100_000_000  # the library's own limit


class Source(NamedTuple):
    """A tensor to be written that need not exist as a whole: `blocks` gives it in parts of whole rows."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    blocks: Callable[[], Iterator[Tensor]]


class Entry(NamedTuple):
    """A tensor in a file: its bytes begin at `begin`."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one index of the first dimension; of all, where there is none."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize


def of(tensor: Tensor) -> Source:
    """A tensor in memory, on any device."""

    def blocks() -> Iterator[Tensor]:
        rows = tensor.detach() if tensor.ndim else tensor.detach().reshape(1)
        for first, count in spans(len(rows), rows[:1].numel() * rows.element_size()):
            yield rows[first : first + count].cpu().contiguous()

    return Source(tensor.dtype, tuple(tensor.shape), blocks)


def stored(path: str, entry: Entry) -> Source:
    """A tensor of another file, which is read in blocks."""

    def blocks() -> Iterator[Tensor]:
        if not entry.shape:
            yield read(path, entry).reshape(1)
            return
        for first, count in spans(entry.shape[0], entry.row_bytes):
            yield read(path, entry, first, count)

    return Source(entry.dtype, entry.shape, blocks)


def spans(num_rows: int, row_bytes: int, first: int = 0) -> Iterator[tuple[int, int]]:
    """Consecutive (first row, count) of at most a block's bytes each."""
    most = max(1, _BLOCK_BYTES // max(1, row_bytes))
    for low in range(first, first + num_rows, most):
        yield low, min(most, first + num_rows - low)


def serialise(tensors: Mapping[str, Source]) -> Iterator[bytes | memoryview]:
    """A safetensors file of the tensors, piece by piece."""
    ordered = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))  # keeps every tensor aligned
    entries, end = {}, 0
    for name in ordered:
        source = tensors[name]
        begin, end = end, end + math.prod(source.shape) * source.dtype.itemsize
        entries[name] = {"dtype": _NAMES[source.dtype], "shape": list(source.shape), "data_offsets": [begin, end]}
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    yield len(header).to_bytes(8, "little")
    yield header
    for name in ordered:
        for block in tensors[name].blocks():
            if block.numel():
                yield _bytes(block)


def entries(path: str) -> dict[str, Entry]:
    """What tensors a file holds. Raises GenattError when it is no safetensors file, a pickle for example."""
    with opened(path) as stream:
        length, size = int.from_bytes(stream.read(8), "little"), stream.seek(0, 2)
        try:
            if not 2 <= length <= min(_MOST_HEADER_BYTES, size - 8):
                raise ValueError(f"a header of {length} bytes in {size}")
            stream.seek(8)
            header = json.loads(stream.read(length))
            header.pop("__metadata__", None)
            return {name: _entry(told, 8 + length, size) for name, told in header.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise GenattError(
                f"{redact(path)} is no safetensors file ({' '.join(str(error).split())[:80]}); nothing else is read: "
                "remove this checkpoint to use an older one"
            ) from None


def read(path: str, entry: Entry, first: int = 0, count: int | None = None) -> Tensor:
    """Rows first … first + count − 1 of a tensor's first dimension (default: all of it), read and nothing else."""
    shape = entry.shape if count is None else (count, *entry.shape[1:])
    tensor = torch.empty(shape, dtype=entry.dtype)
    if tensor.numel():
        with opened(path) as stream:
            stream.seek(entry.begin + first * entry.row_bytes)
            _fill(stream, _bytes(tensor), path)
    return tensor


def _entry(told: dict[str, object], data: int, size: int) -> Entry:
    shape, offsets, dtype = told["shape"], told["data_offsets"], _DTYPES[str(told["dtype"])]
    if not isinstance(shape, list) or not isinstance(offsets, list):
        raise TypeError(f"shape {shape!r} at {offsets!r}")
    if not all(type(number) is int and number >= 0 for number in (*shape, *offsets)):
        raise ValueError(f"shape {shape} at {offsets}")
    begin, end = offsets
    if end - begin != math.prod(shape) * dtype.itemsize or data + end > size:
        raise ValueError(f"bytes {begin} to {end} of {size - data} for {told['dtype']} {shape}")
    return Entry(dtype, tuple(shape), data + begin)


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def _fill(stream: BinaryIO, target: memoryview, path: str) -> None:
    done = 0
    while done < len(target):
        got = stream.readinto(target[done : done + _BLOCK_BYTES])  # type: ignore[attr-defined]
        if not got:
            raise GenattError(f"{redact(path)} ends too early; remove this checkpoint to use an older one")
        done += got
