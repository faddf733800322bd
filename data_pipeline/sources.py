"""Which files a SOURCE means: a known data set, a synthetic one, or a file, directory or glob, here or remote.

A listing is one call that brings the sizes along (on S3 a request for a thousand files). Files come in the order of
their paths, which decides between equal times. Of a path like `log/date=2024-01-01/part.parquet` the file has the
column `date` as well (a hive partition), unless it holds a column of that name itself.
"""

import difflib
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import fsspec
from fsspec.implementations.local import LocalFileSystem
from fsspec.utils import glob_translate

from data_pipeline import known, synthetic
from data_pipeline.config import PrepareConfig
from data_pipeline.errors import GenattError
from data_pipeline.redaction import redact
from data_pipeline.storage import check_access, explaining, filesystem

ENDINGS = {
    "parquet": (".parquet", ".pq"),
    "csv": (".csv", ".tsv", ".csv.gz", ".tsv.gz"),
    "jsonl": (".jsonl", ".ndjson", ".json", ".jsonl.gz", ".ndjson.gz", ".json.gz"),
}
NULL_PARTITION = "__HIVE_DEFAULT_PARTITION__"
WILDCARD = re.compile(r"[*?\[]")


@dataclass(frozen=True)
class SourceFile:
    """One raw file. `path` opens it; `label` is its name inside the source, fit for messages and the manifest."""

    path: str
    label: str
    bytes: int
    format: str  # "parquet", "csv" or "jsonl"
    separator: str = ","
    partition: tuple[tuple[str, str | None], ...] = ()  # columns that its path tells: name, value


@dataclass(frozen=True)
class Source:
    """The interaction files in their order (which breaks ties of time), and the file of item attributes if any."""

    name: str
    files: tuple[SourceFile, ...]
    items: SourceFile | None = None


def resolve(config: PrepareConfig, workdir: Path) -> Source:
    """Finds the files of `config.source`; known sets are materialised in `workdir`.

    Raises
    ------
    GenattError
        Unknown name, missing path, no access, no usable file, an empty file, or a known set that cannot be had.
    """
    by_ending = config.model_copy(update={"format": "auto", "separator": None})  # those options are for the user's log
    name, _, options = config.source.partition(":")
    if name == "synthetic":
        synthetic.write(synthetic.Options.parse(options), workdir)
        source = _from_path(str(workdir), by_ending, config.name or name)
    elif config.source in known.NAMES:
        known.write(config.source, workdir)
        source = _from_path(str(workdir), by_ending, config.name or config.source)
    else:
        source = _from_path(config.source, config, config.name)
    if config.items is None:
        return source
    return Source(source.name, source.files, _one_file(config.items, by_ending))


def _from_path(path: str, config: PrepareConfig, name: str | None) -> Source:
    if "://" in path:
        check_access(path)
    fs, root = filesystem(path)
    with explaining(path, "read"):
        fs.invalidate_cache()  # a listing kept from before may miss files
        try:
            pattern = WILDCARD.search(root) is not None and not (
                isinstance(fs, LocalFileSystem) and os.path.exists(root)
            )
            base, found = _glob(fs, root) if pattern else _listed(fs, root, config.format)
        except FileNotFoundError:
            raise _missing(path) from None
    if not found:
        raise GenattError(f"source {redact(path)}: no {', '.join(_endings(config.format))} file there")
    files = [_describe(fs, file, found[file], base, config) for file in sorted(found)]
    items = None
    if base == root and (logs := [file for file in files if file.label.startswith("interactions.")]):
        items = next((file for file in files if file.label.startswith("items.")), None)
        files = logs
    return Source(name or _stem(base if pattern else root), tuple(files), items)


def _listed(fs: fsspec.AbstractFileSystem, root: str, format_: str) -> tuple[str, dict[str, Any]]:
    """A directory and the data files below it, or a file and where it lies."""
    info = fs.info(root)
    directory = os.path.isdir(root) if isinstance(fs, LocalFileSystem) else info["type"] == "directory"
    if not directory:
        return os.path.dirname(root), {root: info}
    return root, _of_format(_visible(_find(fs, root), root), format_)


def _is_pattern(fs: fsspec.AbstractFileSystem, root: str) -> bool:
    there = isinstance(fs, LocalFileSystem) and os.path.exists(root)  # brackets may just be part of a name
    return WILDCARD.search(root) is not None and not there


def _glob(fs: fsspec.AbstractFileSystem, pattern: str) -> tuple[str, dict[str, Any]]:
    """The directory before the first wildcard, and the files below it that match, or lie in a directory that does.

    Wildcards do not match hidden names unless the pattern has a part that begins like one (`logs/_*/*.csv`).
    """
    base = os.path.dirname(pattern[: WILDCARD.search(pattern).start()])  # type: ignore[union-attr]
    flat = "/" not in pattern[len(base) + 1 :]
    matches = re.compile(glob_translate(pattern)).match
    inside = re.compile(glob_translate(f"{pattern}/**")).match
    # All below `base` in one listing, where a walk would ask for each directory; but not for `directory/*.csv`, beside
    # which there may be directories that hold far more.
    listed = _visible(_find(fs, base, flat), base, pattern)
    found = {file: info for file, info in listed.items() if matches(file) and info["type"] != "directory"}
    for directory in [file for file, info in listed.items() if matches(file) and info["type"] == "directory"]:
        listed |= _visible(_find(fs, directory), base, pattern)
    nested = {file: info for file, info in listed.items() if inside(file) and info["type"] != "directory"}
    return base, found | _of_format(nested, "auto")


def _find(fs: fsspec.AbstractFileSystem, directory: str, flat: bool = False) -> dict[str, Any]:
    """All files below `directory` with their sizes, in one listing; if `flat`, what is directly in it, directories too.

    Of this machine's disks fsspec would leave out, without a word, directories that are links or may not be listed.
    """
    if not isinstance(fs, LocalFileSystem):
        found: dict[str, Any] = fs.find(directory, detail=True, **({"maxdepth": 1, "withdirs": True} if flat else {}))
        return found
    found, seen = {}, set()
    for parent, directories, files in os.walk(directory, onerror=_raise, followlinks=True):
        directories.sort()
        if (real := os.path.realpath(parent)) in seen:  # a link in a circle, or a second way to the same rows
            directories.clear()
            continue
        seen.add(real)
        for path in (os.path.join(parent, name) for name in files):
            found[path] = {"type": "file", "size": os.path.getsize(path) if os.path.exists(path) else 0}
        if flat:
            return found | {os.path.join(parent, name): {"type": "directory", "size": 0} for name in directories}
    return found


def _raise(error: OSError) -> None:
    raise error


def _visible(found: Mapping[str, Any], base: str, pattern: str = "") -> dict[str, Any]:
    """Without what writers leave beside their data: `_SUCCESS`, `.part.crc`, all of `_delta_log`."""
    hiding = tuple({".", "_"} - {part[:1] for part in pattern[len(base) + 1 :].split("/")})
    return {
        file: info
        for file, info in found.items()
        if not file.endswith("/") and not any(part.startswith(hiding) for part in _parts(file, base))
    }


def _of_format(found: dict[str, Any], format_: str) -> dict[str, Any]:
    """The files whose endings say they are data; with a format given and none that ends like it, all of them."""
    chosen = {file: info for file, info in found.items() if file.lower().endswith(tuple(_endings(format_)))}
    return chosen or ({} if format_ == "auto" else found)


def _describe(fs: fsspec.AbstractFileSystem, file: str, info: Any, base: str, config: PrepareConfig) -> SourceFile:
    label = os.path.relpath(file, base) if base else file
    if info["size"] is None:
        raise GenattError(f"source file {label}: its server does not tell its size: copy it to a disk or a bucket")
    if info["size"] == 0:
        raise GenattError(f"source file {label} is empty (0 bytes): write it again, or take it out of the source")
    by_ending = next((kind for kind, endings in ENDINGS.items() if file.lower().endswith(endings)), None)
    format_ = by_ending if config.format == "auto" else config.format
    if format_ is None:
        raise GenattError(
            f"source file {label}: unknown extension: let it end in .parquet, .csv or .jsonl, or set format"
        )
    separator = config.separator or ("\t" if ".tsv" in os.path.basename(file).lower() else ",")
    return SourceFile(fs.unstrip_protocol(file), label, int(info["size"]), format_, separator, _partition(file))


def _partition(file: str) -> tuple[tuple[str, str | None], ...]:
    """The `key=value` directories of a path, percent-decoded; of a key met twice, the innermost."""
    pairs = [part.split("=", 1) for part in os.path.dirname(file).split("/") if re.match(r"[^=]+=.", part)]
    values = {unquote(key): None if value == NULL_PARTITION else unquote(value) for key, value in pairs}
    return tuple(values.items())


def _one_file(path: str, config: PrepareConfig) -> SourceFile:
    files = _from_path(path, config, None).files
    if len(files) > 1:
        raise GenattError(f"items {redact(path)} means {len(files)} files, {files[0].label} first: name one of them")
    return files[0]


def _missing(path: str) -> GenattError:
    """A bare word was meant as a name, anything else as a path."""
    if "/" in path or "." in path or WILDCARD.search(path):
        return GenattError(f"source {redact(path)} does not exist: check the path")
    names = (*known.NAMES, "synthetic")
    near = difflib.get_close_matches(path.partition(":")[0], names, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return GenattError(
        f"unknown source {path!r}: {hint}known are {', '.join(names)} (synthetic is made here, needs no download), "
        "or a path"
    )


def _endings(format_: str) -> Iterable[str]:
    return ENDINGS[format_] if format_ != "auto" else [ending for kind in ENDINGS.values() for ending in kind]


def _parts(file: str, base: str) -> list[str]:
    return file[len(base) :].strip("/").split("/")


def _stem(path: str) -> str:
    """The last part of `path` that is no partition, without its endings."""
    parts = [part for part in path.split("/") if part and "=" not in part]
    return parts[-1].split(".")[0].strip("-_") or "data" if parts else "data"
