"""Where downloads are kept, and how it is known that they are what they should be."""

import fcntl
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from data_pipeline.errors import GenattError
from data_pipeline.known.download import UnavailableError, discard, download
from data_pipeline.storage import one_line


@dataclass(frozen=True)
class File:
    """A file to download.

    Attributes
    ----------
    addresses
        Tried in order: URLs, or `pip:REQUIREMENT` for a wheel.
    digest
        `sha256:…` (or `md5:…` where its publisher gives no other) as published; None where nobody has published one.
        Then the first download is trusted, its sha256 kept beside it, and any later download compared with that.
    bytes
        Its size, for help texts.
    optional
        The set is of use without it.
    """

    name: str
    addresses: tuple[str, ...]
    digest: str | None = None
    bytes: int | None = None
    optional: bool = False


def cache_directory() -> Path:
    """$GENATT_CACHE, else $XDG_CACHE_HOME/genatt, else ~/.cache/genatt."""
    if own := os.environ.get("GENATT_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "genatt"


def cached(name: str, file: File) -> Path | None:
    """The file of the set `name` where the cache has it whole."""
    path = cache_directory() / name / file.name
    expected = _expected(path, file)
    try:
        return path if expected and path.is_file() and digest_of(path, expected) == expected else None
    except OSError as error:
        raise _unusable(path, error) from error


def obtain(name: str, file: File, console: Console) -> Path:
    """The file of the set `name` in the cache, downloaded where it is not there whole.

    Raises
    ------
    UnavailableError
        No address gave it, or gave another content than expected.
    GenattError
        The cache cannot be written, or another process is downloading the same file.
    """
    path = cache_directory() / name / file.name
    with _alone(path):
        if found := cached(name, file):
            return found
        expected = _expected(path, file)
        reasons = []
        for address in file.addresses:
            try:
                part = download(address, path, console)
                actual = digest_of(part, expected or "sha256:")
                if actual != expected is not None:
                    discard(path)
                    raise UnavailableError(f"{file.name} has {actual}, expected {expected}{_pinned_at(path, file)}")
            except UnavailableError as error:
                reasons.append(str(error))
                continue
            if file.digest is None:
                _pin(path).write_text(f"{actual.removeprefix('sha256:')}  {file.name}\n")
                if expected is None:
                    note(console, f"{name}: no hash of {file.name} is published: trusting this download ({actual})")
            part.replace(path)
            discard(path)
            return path
        raise UnavailableError("; ".join(dict.fromkeys(reasons)))


def forget(path: Path) -> None:
    """Takes a cached file out of the cache, with what was noted of its content."""
    path.unlink(missing_ok=True)
    _pin(path).unlink(missing_ok=True)


def note(console: Console, text: str) -> None:
    """Prints one line, however long."""
    console.print(text, soft_wrap=True, markup=False, highlight=False)


def digest_of(path: Path, like: str) -> str:
    """`algorithm:hex` of a file, with the algorithm of `like`."""
    algorithm = like.partition(":")[0]
    with path.open("rb") as content:
        return f"{algorithm}:{hashlib.file_digest(content, algorithm).hexdigest()}"


def _pin(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def _expected(path: Path, file: File) -> str | None:
    if file.digest is not None:
        return file.digest
    pin = _pin(path)
    noted = pin.read_text(errors="replace").split() if pin.is_file() else []  # empty: the disk was full, or a crash
    return f"sha256:{noted[0]}" if noted else None


def _pinned_at(path: Path, file: File) -> str:
    return "" if file.digest else f" as at the first download; if it was replaced there, remove {_pin(path)}"


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """No other process downloads the same file meanwhile; errors of the file system are told in one line."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.with_name(f"{path.name}.lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise GenattError(f"{path} is being downloaded by another process: run again when it is done") from None
            yield
    except UnavailableError:
        raise
    except OSError as error:
        raise _unusable(path, error) from error


def _unusable(path: Path, error: OSError) -> GenattError:
    return GenattError(
        f"cannot keep {path}: {one_line(error)}: free space there, or name another directory with GENATT_CACHE"
    )
