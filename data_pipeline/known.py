"""How a public data set gets here: MovieLens-100K, from its own address or from a package that ships it.

Both ways end in the same 100,000 rows, in the same order, with the same sha256. The archive is kept in a cache
directory ($GENATT_CACHE, else $XDG_CACHE_HOME/genatt, else ~/.cache/genatt) and checked at every use. MovieLens may be
used for research, not redistributed: the project ships none of it.
"""

import hashlib
import http.client
import io
import os
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from data_pipeline.errors import GenattError
from data_pipeline.storage import one_line

ROWS_SHA256 = "06416e597f82b7342361e41163890c81036900f418ad91315590814211dca490"  # of u.data: user, item, rating, time
ROW_COLUMNS = ["user_id", "item_id", "rating", "timestamp"]
GENRES = ["unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama"]
GENRES += ["Fantasy", "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western"]

CONNECT_SECONDS = 5
DOWNLOAD_SECONDS = 120


def fetch_url(url: str, target: Path) -> None:
    """Downloads `url` to `target` within `DOWNLOAD_SECONDS`; `OSError` where it cannot."""
    deadline = time.monotonic() + DOWNLOAD_SECONDS
    with urllib.request.urlopen(url, timeout=CONNECT_SECONDS) as response, target.open("wb") as file:
        while chunk := response.read(1 << 16):
            file.write(chunk)
            if time.monotonic() > deadline:
                raise TimeoutError(f"not complete after {DOWNLOAD_SECONDS} s")


def fetch_wheel(requirement: str, target: Path) -> None:
    """Downloads the wheel of `requirement` to `target` with pip, installing nothing; `OSError` where it cannot."""
    with tempfile.TemporaryDirectory(dir=target.parent) as directory:
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--no-deps",
            "--only-binary=:all:",
            "--quiet",
            "--retries",
            "1",
        ]
        command += ["--disable-pip-version-check", "--timeout", str(3 * CONNECT_SECONDS), "-d", directory, requirement]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=DOWNLOAD_SECONDS, check=False)
        except subprocess.TimeoutExpired as error:
            raise TimeoutError(f"pip was not done after {DOWNLOAD_SECONDS} s") from error
        wheels = list(Path(directory).glob("*.whl"))
        if done.returncode or not wheels:
            raise OSError((done.stderr.strip().splitlines() or ["pip failed without a word"])[-1])
        wheels[0].replace(target)


def rows_of_zip(archive: zipfile.ZipFile) -> bytes:
    """`u.data` of GroupLens' own archive."""
    return archive.read("ml-100k/u.data")


def items_of_zip(archive: zipfile.ZipFile) -> pl.DataFrame:
    """`u.item` of GroupLens' own archive: item_id, title, genres list<string>."""
    text = archive.read("ml-100k/u.item").decode("latin-1").encode()
    raw = pl.read_csv(text, separator="|", has_header=False, infer_schema=False, quote_char=None)
    item_id, title, _, _, _, *flags = raw.columns
    named = [pl.when(pl.col(flag) == "1").then(pl.lit(genre)) for flag, genre in zip(flags, GENRES, strict=True)]
    genres = pl.concat_list(named).list.drop_nulls()
    return raw.select(item_id=pl.col(item_id).cast(pl.Int64), title=pl.col(title), genres=genres)


def rows_of_wheel(archive: zipfile.ZipFile) -> bytes:
    """The same rows from RecBole's example data: `u.data` under a header line."""
    return archive.read("recbole/dataset_example/ml-100k/ml-100k.inter").partition(b"\n")[2]


def items_of_wheel(archive: zipfile.ZipFile) -> pl.DataFrame:
    """The items of RecBole's example data: item_id, title, genres list<string>."""
    text = archive.read("recbole/dataset_example/ml-100k/ml-100k.item")
    raw = pl.read_csv(text, separator="\t", infer_schema=False, quote_char=None)
    item_id, title, year, genres = (pl.col(name) for name in raw.columns)
    return raw.select(
        item_id=item_id.cast(pl.Int64), title=pl.format("{} ({})", title, year), genres=genres.str.split(" ")
    )


@dataclass(frozen=True)
class Origin:
    """One place MovieLens-100K can come from: what to fetch, what it must hash to, and how to read it."""

    label: str
    filename: str
    sha256: str
    fetch: Callable[[Path], None]
    rows: Callable[[zipfile.ZipFile], bytes]
    items: Callable[[zipfile.ZipFile], pl.DataFrame]


ORIGINS = (
    Origin(
        label="files.grouplens.org",
        filename="ml-100k.zip",
        sha256="50d2a982c66986937beb9ffb3aa76efe955bf3d5c6b761f4e3a7cd717c6a3229",
        fetch=lambda target: fetch_url("https://files.grouplens.org/datasets/movielens/ml-100k.zip", target),
        rows=rows_of_zip,
        items=items_of_zip,
    ),
    Origin(
        label="the PyPI wheel recbole 1.2.1",
        filename="recbole-1.2.1-py3-none-any.whl",
        sha256="9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407",
        fetch=lambda target: fetch_wheel("recbole==1.2.1", target),
        rows=rows_of_wheel,
        items=items_of_wheel,
    ),
)


def write_ml_100k(directory: Path, origins: tuple[Origin, ...] = ORIGINS) -> None:
    """Writes `interactions.parquet` and `items.parquet` of MovieLens-100K into `directory`.

    Raises
    ------
    GenattError
        No origin could be had; the message names each with its reason.
    """
    origin, content = _archive(origins)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        rows = origin.rows(archive)
        if _sha256(rows) != ROWS_SHA256:
            raise GenattError(f"ml-100k from {origin.label}: rows have sha256 {_sha256(rows)}, expected {ROWS_SHA256}")
        origin.items(archive).write_parquet(directory / "items.parquet")
    table = pl.read_csv(rows, separator="\t", has_header=False, new_columns=ROW_COLUMNS)
    table.write_parquet(directory / "interactions.parquet")


def cache_directory() -> Path:
    """Where downloads are kept."""
    if own := os.environ.get("GENATT_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "genatt"


def _archive(origins: tuple[Origin, ...]) -> tuple[Origin, bytes]:
    """The first archive that is cached or can be fetched, with the sha256 it must have."""
    cache = cache_directory() / "ml-100k"
    for origin in origins:
        cached = cache / origin.filename
        if cached.is_file() and _sha256(content := cached.read_bytes()) == origin.sha256:
            return origin, content
    failures = []
    for origin in origins:
        try:
            cache.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=cache) as part:
                fetched = Path(part) / origin.filename
                origin.fetch(fetched)
                content = fetched.read_bytes()
                if _sha256(content) != origin.sha256:
                    raise OSError(f"sha256 {_sha256(content)}, expected {origin.sha256}")
                fetched.replace(cache / origin.filename)
            return origin, content
        except (OSError, http.client.HTTPException) as error:
            reason = error.reason if isinstance(error, urllib.error.URLError) else error
            failures.append(f"{origin.label} ({one_line(reason) if isinstance(reason, BaseException) else reason})")
    raise GenattError(
        f"ml-100k cannot be had from {' nor from '.join(failures)}: "
        "name your own copy with --data PATH, or use the source `synthetic`, which needs no download"
    )


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
