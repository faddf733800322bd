"""Public data sets by name: fetched from their own addresses, checked, and written as Parquet.

None of them is shipped with this project: they are for research, and MovieLens may not be redistributed.
"""

import gzip
import zipfile
import zlib
from pathlib import Path

import polars as pl
import pyarrow as pa
from rich.console import Console

from data_pipeline.errors import GenattError
from data_pipeline.known import cache
from data_pipeline.known.cache import cache_directory
from data_pipeline.known.download import UnavailableError
from data_pipeline.known.sets import SETS, KnownSet, Origin
from data_pipeline.storage import one_line

__all__ = ["NAMES", "cache_directory", "describe", "write"]

NAMES = tuple(SETS)
UNREADABLE: tuple[type[Exception], ...] = (zipfile.BadZipFile, zlib.error, gzip.BadGzipFile, EOFError, KeyError)
UNREADABLE += (ValueError, SyntaxError, pl.exceptions.PolarsError, pa.ArrowException)


def describe(name: str) -> str:
    """One line: how large the set is, where it comes from, and under which licence."""
    known = SETS[name]
    files = known.origins[0].files
    size = sum(file.bytes or 0 for file in files) / 1e6
    download = f"{size:,.0f} MB from " if size else ""
    return f"{name}: {known.rows:,} rows of {known.users:,} users; {download}{files[0].addresses[0]}; {known.licence}"


def write(name: str, directory: Path, quiet: bool = False) -> None:
    """Writes the set as `interactions.parquet` (user_id, item_id, rating, timestamp) and `items.parquet`.

    Time is in unix seconds, rows are in the order of the source. Archives stay in the cache directory (see
    `cache_directory`) and are checked at every use. Attributes of items that cannot be had are left out, with a line
    on stderr.

    Parameters
    ----------
    quiet
        No progress bar, and no notes on stderr.

    Raises
    ------
    GenattError
        No origin could be had (the message names each with its reason), or what it has is not that set.
    """
    known, console = SETS[name], Console(stderr=True, quiet=quiet)
    origin, paths = _obtained(known, console)
    try:
        origin.read(paths, directory)
    except UNREADABLE as error:
        if "os error" in str(error):  # Polars has no class of its own for a full disk
            raise _unwritable(name, directory, error) from error
        _forget(origin, paths)
        raise GenattError(
            f"{name} from {origin.label}: not in the layout of that set ({one_line(error)}): run it again to fetch it "
            "anew, or name your own copy with --data PATH"
        ) from error
    except OSError as error:
        raise _unwritable(name, directory, error) from error
    _check(known, origin, paths, directory)


def _unwritable(name: str, directory: Path, error: Exception) -> GenattError:
    return GenattError(f"{name}: cannot write {directory}: {one_line(error)}: free space there")


def _obtained(known: KnownSet, console: Console) -> tuple[Origin, list[Path | None]]:
    """The first origin that is in the cache, else the first that can be fetched, and its files there."""
    for origin in known.origins:
        paths = [cache.cached(known.name, file) for file in origin.files]
        if all(path is not None for path in paths):
            return origin, paths
    failures = []
    for origin in known.origins:
        try:
            return origin, [_path(known, file, console) for file in origin.files]
        except UnavailableError as error:
            failures.append(f"{origin.label} ({error})")
    raise GenattError(
        f"{known.name} cannot be had from {' nor from '.join(failures)}: "
        "name your own copy with --data PATH, or use the source `synthetic`, which needs no download"
    )


def _path(known: KnownSet, file: cache.File, console: Console) -> Path | None:
    try:
        return cache.obtain(known.name, file, console)
    except UnavailableError as error:
        if not file.optional:
            raise
        cache.note(console, f"{known.name}: no attributes of items: {file.name} cannot be had ({error})")
        return None


def _check(known: KnownSet, origin: Origin, paths: list[Path | None], directory: Path) -> None:
    """Compares what was read with the published counts: it stands in for a hash where none is published."""
    log = pl.scan_parquet(directory / "interactions.parquet")
    counts = log.select(users=pl.col("user_id").n_unique(), items=pl.col("item_id").n_unique(), rows=pl.len())
    for what, found in counts.collect().to_dicts()[0].items():
        expected = getattr(known, what)
        if expected is not None and found != expected:
            _forget(origin, paths)
            raise GenattError(
                f"{known.name} from {origin.label}: {found:,} {what} where the set has {expected:,}: run it again to "
                "fetch it anew, or name your own copy with --data PATH"
            )


def _forget(origin: Origin, paths: list[Path | None]) -> None:
    """Takes back the trust in a first download; what has its published hash is right, whatever went wrong."""
    for file, path in zip(origin.files, paths, strict=True):
        if path is not None and file.digest is None:
            cache.forget(path)
