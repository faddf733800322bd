"""Names and single files of a checkpoint: what may be in one, written in blocks with its sha256, and read again.

Local or remote, nothing is renamed: a checkpoint is what has `COMPLETE`, which is written last, and atomically.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import IO

from fsspec.implementations.local import LocalFileSystem

from data_pipeline.errors import GenattError
from data_pipeline.filesystems import explaining, filesystem
from data_pipeline.storage import opened, read_bytes, redact, write_bytes

COMPLETE = "COMPLETE"
DENSE, PROGRESS, CONFIG, TABLES = "dense.safetensors", "progress.json", "config.yaml", "tables.json"
AMENDED = "progress-amended.json"  # takes the place of PROGRESS where it is there
BUNDLE = "bundle.json"
USE_OLDER = "remove this checkpoint to use an older one"
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*\.(safetensors|json|yaml)")
_READ_BYTES = 8 << 20


def is_local(path: str) -> bool:
    """Whether `path` is on a file system of this machine."""
    return isinstance(filesystem(path)[0], LocalFileSystem)


def inside(directory: str, name: str) -> str:
    """The path of a file of a checkpoint.

    Raises GenattError where `name` leads out of the directory, also by a link, or is of a kind that is never read.
    """
    path = f"{directory}/{name}"
    if not _NAME.fullmatch(name):
        raise GenattError(
            f"checkpoint {redact(directory)} names the file {name!r}: only plain names of safetensors, JSON and YAML "
            f"files are read, no pickles and nothing outside; {USE_OLDER}"
        )
    if is_local(directory):
        root, place = (Path(filesystem(part)[1]).resolve() for part in (directory, path))
        if place.parent != root:
            raise GenattError(f"checkpoint {directory}: {name} is a link to {place}, outside of it; {USE_OLDER}")
    return path


def write(path: str, blocks: Iterable[bytes | memoryview]) -> str:
    """Write a file and return its sha256. Remote ones are put together on the local disk: uploads want their size."""
    fs, inner = filesystem(path)
    if isinstance(fs, LocalFileSystem):
        os.makedirs(os.path.dirname(inner), exist_ok=True)
        with open(inner, "wb") as file:
            return _pour(blocks, file)
    with tempfile.NamedTemporaryFile() as file:
        digest = _pour(blocks, file)
        with explaining(path, "write"):
            fs.put_file(file.name, inner)
    return digest


def write_complete(directory: str, content: bytes) -> None:
    """Seal a checkpoint: from now on it counts."""
    path = f"{directory}/{COMPLETE}"
    if not is_local(directory):
        write_bytes(path, content)  # a store shows an object whole or not at all
        return
    inner = filesystem(path)[1]
    temporary = f"{inner}.tmp"
    write(temporary, [content])
    sync(os.path.dirname(inner))  # the names of the other files, before the one that vouches for them
    os.rename(temporary, inner)
    sync(os.path.dirname(inner))
    sync(os.path.dirname(os.path.dirname(inner)))  # older ones are removed next: this one must be found


def sync(path: str) -> None:
    """Have a local directory's entries on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: str) -> str:
    """Of a file's content, read in blocks."""
    digest = hashlib.sha256()
    with opened(path) as stream:
        while block := stream.read(_READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


def read_if_there(path: str) -> bytes | None:
    """The content of a small file; None where there is none."""
    try:
        return read_bytes(path)
    except GenattError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return None
        raise


def remove(paths: list[str]) -> None:
    """Remove files of one storage."""
    fs, _ = filesystem(paths[0])
    with explaining(paths[0], "remove"):
        fs.rm([filesystem(path)[1] for path in paths])


def _pour(blocks: Iterable[bytes | memoryview], file: IO[bytes]) -> str:
    digest = hashlib.sha256()
    for block in blocks:
        digest.update(block)
        file.write(block)
    file.flush()
    os.fsync(file.fileno())
    return digest.hexdigest()
