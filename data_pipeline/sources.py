"""Which files a SOURCE means: a known data set, a synthetic one, or a file, directory or glob."""

import difflib
import os
from dataclasses import dataclass
from pathlib import Path

import fsspec

from data_pipeline import known, synthetic
from data_pipeline.config import PrepareConfig
from data_pipeline.errors import GenattError
from data_pipeline.storage import filesystem, one_line, redact

KNOWN_SETS = ("ml-100k", "synthetic")
PARQUET_ENDINGS = (".parquet", ".pq")
CSV_ENDINGS = (".csv", ".tsv", ".csv.gz", ".tsv.gz")


@dataclass(frozen=True)
class SourceFile:
    """One raw file. `path` opens it; `label` is its name inside the source, fit for messages and the manifest."""

    path: str
    label: str
    bytes: int
    format: str  # "parquet" or "csv"
    separator: str = ","


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
        Unknown name, missing path, no usable file, an empty file, or a known set that cannot be had.
    """
    by_ending = config.model_copy(update={"format": "auto", "separator": None})  # those options are for the user's log
    name, _, options = config.source.partition(":")
    if name == "synthetic":
        synthetic.write(synthetic.Options.parse(options), workdir)
        source = _from_path(str(workdir), by_ending, config.name or name)
    elif config.source == "ml-100k":
        known.write_ml_100k(workdir)
        source = _from_path(str(workdir), by_ending, config.name or name)
    else:
        source = _from_path(config.source, config, config.name)
    if config.items is None:
        return source
    return Source(source.name, source.files, _from_path(config.items, by_ending, None).files[0])


def _from_path(path: str, config: PrepareConfig, name: str | None) -> Source:
    fs, root = filesystem(path)
    items = None
    try:
        if any(mark in root for mark in "*?["):
            found, base = sorted(fs.glob(root)), os.path.dirname(root.split("*")[0].split("?")[0].split("[")[0])
        elif fs.isdir(root):
            found, base = sorted(fs.find(root)), root
            found = [file for file in found if file.endswith(PARQUET_ENDINGS + CSV_ENDINGS) and not _hidden(file, root)]
            if named := [file for file in found if file.startswith(f"{root}/interactions.")]:
                items = next((file for file in found if file.startswith(f"{root}/items.")), None)
                found = named
        elif fs.exists(root):
            found, base = [root], os.path.dirname(root)
        else:
            raise _missing(path)
        if not found:
            raise GenattError(f"source {redact(path)}: no {', '.join(PARQUET_ENDINGS + CSV_ENDINGS)} file there")
        describe = [_describe(fs, file, base, config) for file in found]
        attributes = None if items is None else _describe(fs, items, base, config)
    except (OSError, _botocore_error()) as error:
        raise GenattError(
            f"cannot read source {redact(path)}: {one_line(error)}: check the path and your access"
        ) from error
    return Source(name or _stem(root), tuple(describe), attributes)


def _describe(fs: fsspec.AbstractFileSystem, file: str, base: str, config: PrepareConfig) -> SourceFile:
    label = os.path.relpath(file, base) if base else file
    bytes_ = int(fs.size(file) or 0)
    if bytes_ == 0:
        raise GenattError(f"source file {label} is empty (0 bytes): write it again, or take it out of the source")
    by_ending = "parquet" if file.endswith(PARQUET_ENDINGS) else "csv" if file.endswith(CSV_ENDINGS) else None
    format_ = by_ending if config.format == "auto" else config.format
    if format_ is None:
        raise GenattError(f"source file {label}: unknown extension: let it end in .parquet or .csv, or set format")
    separator = config.separator or ("\t" if ".tsv" in os.path.basename(file) else ",")
    return SourceFile(fs.unstrip_protocol(file), label, bytes_, format_, separator)


def _missing(path: str) -> GenattError:
    """A bare word was meant as a name, anything else as a path."""
    if "/" in path or "." in path:
        return GenattError(f"source {redact(path)} does not exist: check the path")
    near = difflib.get_close_matches(path.partition(":")[0], KNOWN_SETS, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return GenattError(
        f"unknown source {path!r}: {hint}known are {', '.join(KNOWN_SETS)} (made here, needs no download), or a path"
    )


def _hidden(file: str, root: str) -> bool:
    return any(part.startswith((".", "_")) for part in os.path.relpath(file, root).split("/"))


def _stem(root: str) -> str:
    return os.path.basename(root.rstrip("/")).split(".")[0].strip("*?[]-_") or "data"


def _botocore_error() -> type[Exception]:
    """The base class of S3 access errors, where S3 support is installed."""
    try:
        from botocore.exceptions import BotoCoreError
    except ImportError:
        return OSError
    base: type[Exception] = BotoCoreError
    return base
