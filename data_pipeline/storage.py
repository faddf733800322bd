"""Where bytes live: local or remote paths behind fsspec, and a directory that appears whole or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import fsspec
from fsspec.implementations.local import LocalFileSystem

from data_pipeline.errors import GenattError

# A wrong endpoint or wrong keys must fail, not hang: botocore alone would retry for minutes.
S3_OPTIONS = {"config_kwargs": {"connect_timeout": 5, "read_timeout": 60, "retries": {"max_attempts": 2}}}


def filesystem(path: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of `path` and the path inside it; `GenattError` for an unknown or uninstalled protocol."""
    options: dict[str, Any] = S3_OPTIONS if path.startswith(("s3://", "s3a://")) else {}
    try:
        fs, inner = fsspec.core.url_to_fs(path, **options)
    except (ValueError, ImportError) as error:
        raise GenattError(f"cannot open {redact(path)}: {one_line(error)}: check the protocol before ://") from error
    return fs, inner


def redact(path: str) -> str:
    """`path` without what may be secret in it: user, password and query string of a URL."""
    if "://" not in path:
        return path
    url = urlsplit(path)
    return urlunsplit((url.scheme, url.netloc.rpartition("@")[2], url.path, "", ""))


def one_line(error: BaseException) -> str:
    """What an exception of a library says, in one line."""
    return " ".join(str(error).split()) or type(error).__name__


@contextmanager
def publishing(out: str) -> Iterator[str]:
    """Yields the directory to write to; `out` exists in full after the block, or not at all if the block raised.

    A local `out` is renamed from a sibling directory. Remote stores cannot rename, so there the block writes to `out`
    itself, and must write the file that marks it complete (the manifest) last.

    Raises
    ------
    GenattError
        `out` exists already, or cannot be written.
    """
    fs, path = filesystem(out)
    local = isinstance(fs, LocalFileSystem)
    staging = f"{path}.tmp-{os.getpid()}" if local else out

    def discard() -> None:
        if local:
            shutil.rmtree(staging, ignore_errors=True)
        elif fs.exists(path):
            fs.rm(path, recursive=True)

    with _writing(out):
        if fs.exists(path):
            raise GenattError(f"output {redact(out)} exists already: choose another --out, or remove it first")
        if local:
            discard()  # what a killed process with this process's id may have left
            os.makedirs(staging)
        else:  # a missing bucket or right shows now, not after the work
            fs.pipe_file(f"{path}/.writable", b"")
            fs.rm_file(f"{path}/.writable")
    try:
        yield staging
        if local:
            with _writing(out):
                os.rename(staging, path)
    except BaseException:
        discard()
        raise


def write_bytes(path: str, content: bytes) -> None:
    """Writes one file and makes its local directories; `GenattError` where it cannot."""
    fs, inner = filesystem(path)
    with _writing(path):
        if isinstance(fs, LocalFileSystem):
            os.makedirs(os.path.dirname(inner), exist_ok=True)
        fs.pipe_file(inner, content)


@contextmanager
def _writing(path: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise GenattError(
            f"cannot write {redact(path)}: {one_line(error)}: choose an --out you may write to"
        ) from error
