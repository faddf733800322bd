"""Where bytes live: local or remote paths behind fsspec, and a directory that appears whole or not at all.

Everything here ends in bounded time and fails with one line. Of S3, also what is done with the file system itself
(`filesystem(path)[0].find`, …) is retried and bounded, see `data_pipeline.s3`; gcsfs and adlfs retry by themselves.
A file system is asked for anew wherever it is needed, by path: one made before a fork is of no use after it.
"""

import io
import os
import queue
import re
import secrets
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any, BinaryIO

from fsspec.implementations.local import LocalFileSystem

from data_pipeline.errors import GenattError
from data_pipeline.filesystems import S3_SCHEMES, explained, explaining, filesystem
from data_pipeline.redaction import one_line as one_line
from data_pipeline.redaction import redact

ACCESS_SECONDS = 12.0  # what `check_access` takes at most
S3_ACCESS_OPTIONS = {"retry_seconds": 5, "connect_seconds": 3, "silence_seconds": 5}
READ_BLOCK = 1 << 20  # bytes that `opened` asks a remote store for at once, at least
MARKER = "_preparing-"  # with a token: a preparation writes here
COMPLETE = "manifest.json"  # a directory with this file is complete: it is written last and removed first


def check_access(path: str, timeout: float = ACCESS_SECONDS) -> None:
    """Makes one request to the store of `path`; to be called before any heavy work. Local paths pass.

    Whether anything is at `path` is not asked, only whether it can be.

    Parameters
    ----------
    timeout
        Seconds until a store that says nothing is given up.

    Raises
    ------
    GenattError
        No or wrong credentials, no such bucket, or no answer: with what to check.
    """
    fs, _ = filesystem(path)
    if isinstance(fs, LocalFileSystem):
        return
    outcome: queue.Queue[BaseException | None] = queue.Queue()

    def ask() -> None:
        try:
            _ask(path)
            outcome.put(None)
        except Exception as error:
            outcome.put(error)

    # A thread of its own: looking for credentials and resolving a name have no time limit that could be set.
    threading.Thread(target=ask, daemon=True, name="check_access").start()
    try:
        error = outcome.get(timeout=timeout)
    except queue.Empty:
        raise GenattError(
            f"cannot open {redact(path)}: no answer from {getattr(fs, 'endpoint', fs.protocol[0])} in {timeout:.0f} s: "
            "check the network, and AWS_ENDPOINT_URL for s3"
        ) from None
    if error is not None:
        raise explained(path, "open", error) from error


def _ask(path: str) -> None:
    if path.startswith(S3_SCHEMES):
        fs, inner = filesystem(path, **S3_ACCESS_OPTIONS)
        bucket, key, _ = fs.split_path(inner)
        if not bucket:
            raise GenattError(f"{redact(path)} names no bucket: write s3://BUCKET/PATH")
        fixed = re.split(r"[*?\[]", key)[0]
        try:
            fs.call_s3("list_objects_v2", Bucket=bucket, Prefix=fixed, MaxKeys=1)
        except PermissionError as refused:
            if not key or fixed != key:
                raise
            try:  # who may read a file need not have the right to list
                fs.call_s3("head_object", Bucket=bucket, Key=key)
            except OSError:
                raise refused from refused.__cause__  # answers to HEAD have no text
    else:
        fs, inner = filesystem(path)
        with suppress(FileNotFoundError):
            fs.info(inner)


def read_bytes(path: str) -> bytes:
    """A whole file. `GenattError` where it cannot be read; if none is there, its `__cause__` is `FileNotFoundError`."""
    fs, inner = filesystem(path)
    with explaining(path, "read"):
        return bytes(fs.cat_file(inner))


def read_ranges(path: str, ranges: Iterable[tuple[int, int]]) -> list[bytes]:
    """The bytes [start, stop) of each range, read side by side; `GenattError` as for `read_bytes`."""
    fs, inner = filesystem(path)
    wanted = list(ranges)
    asked = [(start, stop) for start, stop in wanted if start < stop]  # a store answers an empty range with all it has
    with explaining(path, "read"):
        parts = iter(
            fs.cat_ranges([inner] * len(asked), *map(list, zip(*asked, strict=True)), on_error="raise") if asked else []
        )
        return [bytes(next(parts)) if start < stop else b"" for start, stop in wanted]


@contextmanager
def opened(path: str, block_size: int = READ_BLOCK) -> Iterator[BinaryIO]:
    """`path` as a seekable binary stream for reading.

    A remote file that is replaced while it is read is an error, not a mixture of the two. What fails in reading is a
    `GenattError`; what the block itself raises passes as it is.

    Parameters
    ----------
    block_size
        Bytes asked for at once, at least. A read of more is one request.
    """
    fs, inner = filesystem(path)
    with explaining(path, "read"):
        if isinstance(fs, LocalFileSystem):
            stream: BinaryIO = open(inner, "rb")  # noqa: SIM115 (closed below)
        else:
            stream = io.BufferedReader(_Remote(path, fs.open(inner, "rb", cache_type="none")), block_size)
    with stream:
        yield stream


def write_bytes(path: str, content: bytes) -> None:
    """Writes one file and makes its local directories; `GenattError` where it cannot."""
    fs, inner = filesystem(path)
    with explaining(path, "write"):
        if isinstance(fs, LocalFileSystem):
            os.makedirs(os.path.dirname(inner), exist_ok=True)
        _to_the_end(fs.pipe_file, inner, content)


def copy(source: str, target: str) -> None:
    """Copies one file, and makes its local directories; inside one store nothing passes through this machine.

    Between two stores the whole file is held in memory.
    """
    (from_fs, from_inner), (to_fs, to_inner) = filesystem(source), filesystem(target)
    if from_fs is not to_fs:
        write_bytes(target, read_bytes(source))
        return
    with explaining(source, f"copy to {redact(target)}"):
        if isinstance(to_fs, LocalFileSystem):
            os.makedirs(os.path.dirname(to_inner), exist_ok=True)
        _to_the_end(from_fs.cp_file, from_inner, to_inner)


def _to_the_end(write: Callable[..., Any], *arguments: Any) -> None:
    """Calls `write`, also to its end when Ctrl-C comes meanwhile.

    fsspec's requests go on in a thread after an interrupt: a manifest could appear after all else has been removed.
    """
    with ThreadPoolExecutor(1) as thread:
        thread.submit(write, *arguments).result()


@contextmanager
def publishing(out: str) -> Iterator[str]:
    """Yields the directory to write to; `out` is complete after the block, or holds nothing if the block raised.

    A local `out` is renamed from a sibling directory. Remote stores cannot rename, so there the block writes to `out`
    itself, and must write `COMPLETE` last: a reader takes what is without it for nothing. Of two preparations into one
    `out` at most one goes on: locally the first to finish; remotely each puts a marker of its own there and then
    looks, and goes on only if it sees nothing but its own. This needs listings that show what was written before, as
    those of S3, GCS and Azure do, and no conditional writes, which many stores that speak S3 have not.

    All that writes to `out` must have ended when the block does.

    Raises
    ------
    GenattError
        There is something at `out` already, another preparation writes there, or it cannot be written.
    """
    fs, path = filesystem(out)
    with _renamed(out, path) if isinstance(fs, LocalFileSystem) else _marked(out) as directory:
        yield directory


def check_free(out: str, option: str = "--out") -> None:
    """Refuses an `out` where something is already, as `publishing` does; nothing is written. option: what named it."""
    fs, path = filesystem(out)
    if not isinstance(fs, LocalFileSystem):
        if there := _names(out.rstrip("/")):
            raise _taken(out, there, option)
        return
    with explaining(out, "write"):
        if os.path.lexists(path.rstrip("/")):
            raise _taken(out, option=option)


@contextmanager
def _renamed(out: str, path: str) -> Iterator[str]:
    path = path.rstrip("/")
    staging = f"{path}.tmp-{secrets.token_hex(4)}"
    check_free(out)
    with explaining(out, "write"):
        os.makedirs(staging)
    try:
        yield staging
        with explaining(out, "write"):
            if os.path.lexists(path):  # rename would replace an empty directory
                raise _taken(out)
            os.rename(staging, path)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


@contextmanager
def _marked(out: str) -> Iterator[str]:
    out = out.rstrip("/")
    marker = f"{MARKER}{secrets.token_hex(8)}"
    check_free(out)  # before the marker: a complete data set stays as it is
    try:
        write_bytes(f"{out}/{marker}", b"genatt prepare writes here. If none is running, remove the whole directory.")
        if (there := _names(out)) != [marker]:
            raise _taken(out, there)
    except BaseException:
        with suppress(GenattError):
            _remove(out, [marker])
        raise
    try:
        yield out
    except BaseException:
        with suppress(GenattError):  # what the block raised is the news
            _remove(out, [COMPLETE])
            if COMPLETE not in (there := _names(out)):  # stores say nothing of a file they did not remove
                _remove(out, [name for name in there if not name.startswith(MARKER)])
                _remove(out, [marker])
        raise
    with suppress(GenattError):  # what was prepared is complete, with the marker or without
        _remove(out, [marker])


def _names(out: str) -> list[str]:
    """All files below a remote `out`, by their paths inside it."""
    fs, path = filesystem(out)
    with explaining(out, "write"), suppress(FileNotFoundError):
        return sorted(name.removeprefix(f"{path}/") for name in fs.find(path))
    return []


def _remove(out: str, names: list[str]) -> None:
    fs, path = filesystem(out)
    with explaining(out, "write"), suppress(FileNotFoundError):
        fs.rm([f"{path}/{name}" for name in names])


def _taken(out: str, there: Iterable[str] = (), option: str = "--out") -> GenattError:
    mend = f"choose another {option}, or remove it first"
    if any(name.startswith(MARKER) for name in there):
        return GenattError(f"output {redact(out)}: another preparation writes there, or was killed doing so: {mend}")
    return GenattError(f"output {redact(out)} exists already: {mend}")


class _Remote(io.RawIOBase):
    """A remote file whose errors are explained where they happen, apart from those of who decodes what it reads."""

    def __init__(self, path: str, stream: Any) -> None:
        self.path, self.stream = path, stream

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        return int(self.stream.seek(offset, whence))

    def tell(self) -> int:
        return int(self.stream.tell())

    def readinto(self, buffer: Any) -> int:
        with explaining(self.path, "read"):
            content = self.stream.read(len(buffer))
        buffer[: len(content)] = content
        return len(content)

    def close(self) -> None:
        self.stream.close()
        super().close()
