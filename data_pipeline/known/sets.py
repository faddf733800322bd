"""The table of public data sets: where each comes from, what it must hash to, how it is read, and its licence.

Hashes are those that somebody else has published, each with its source here. The counts are the publishers' own, of
the sets' README files and pages, and those of the literature.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.known import amazon, movielens
from data_pipeline.known.cache import File

MOVIELENS_LICENCE = "GroupLens terms: research only, no redistribution, no commercial use without permission"
AMAZON_LICENCE = "no licence stated; McAuley et al. 2015 offer it for research"


@dataclass(frozen=True)
class Origin:
    """One place a set can come from. `read` writes both Parquet files from its files (None: optional and missing)."""

    label: str
    files: tuple[File, ...]
    read: Callable[[list[Path | None], Path], None]


@dataclass(frozen=True)
class KnownSet:
    """A set and its origins, tried in order. `items`: those that occur in the log; None where nobody counted them."""

    name: str
    users: int
    items: int | None
    rows: int
    licence: str
    origins: tuple[Origin, ...]


def _movielens(name: str, users: int, items: int | None, rows: int, bytes_: int, digest: str) -> KnownSet:
    path = f"//files.grouplens.org/datasets/movielens/{name}.zip"
    # A hash makes plain http as good, and lets a run outlive an expired certificate.
    archive = File(f"{name}.zip", (f"https:{path}", f"http:{path}"), digest, bytes_)
    origins = [Origin("files.grouplens.org", (archive,), movielens.READERS[name])]
    if name == "ml-100k":
        wheel = File(
            "recbole-1.2.1-py3-none-any.whl",
            ("pip:recbole==1.2.1",),
            "sha256:9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407",
        )
        origins.append(Origin("the PyPI wheel recbole 1.2.1", (wheel,), movielens.read_recbole_wheel))
    return KnownSet(name, users, items, rows, MOVIELENS_LICENCE, tuple(origins))


def _amazon(
    name: str, category: str, users: int, items: int, rows: int, reviews: str | None = None, metadata: str | None = None
) -> KnownSet:
    def file(filename: str, digest: str | None, optional: bool) -> File:
        path = f"//snap.stanford.edu/data/amazon/productGraph/categoryFiles/{filename}"
        addresses = (f"https:{path}", f"http:{path}") if digest else (f"https:{path}",)
        return File(filename, addresses, digest, optional=optional)

    files = (
        file(f"reviews_{category}_5.json.gz", reviews, optional=False),
        file(f"meta_{category}.json.gz", metadata, optional=True),
    )
    return KnownSet(name, users, items, rows, AMAZON_LICENCE, (Origin("snap.stanford.edu", files, amazon.read),))


SETS = {
    known.name: known
    for known in (
        # Sizes and sha256 of ml-100k to ml-25m: tensorflow/datasets, url_checksums/movielens.txt. MD5 of ml-32m:
        # GroupLens itself, ml-32m.zip.md5.
        _movielens(
            *("ml-100k", 943, 1_682, 100_000, 4_924_029),
            "sha256:50d2a982c66986937beb9ffb3aa76efe955bf3d5c6b761f4e3a7cd717c6a3229",
        ),
        _movielens(
            *("ml-1m", 6_040, 3_706, 1_000_209, 5_917_549),
            "sha256:a6898adb50b9ca05aa231689da44c217cb524e7ebd39d264c56e2832f2c54e20",
        ),
        _movielens(
            *("ml-20m", 138_493, 26_744, 20_000_263, 198_702_078),
            "sha256:96f243c338a8665f6bcc89c53edf6ee39162a846940de6b7c8c48aeada765ff3",
        ),
        _movielens(
            *("ml-25m", 162_541, 59_047, 25_000_095, 261_978_986),
            "sha256:8b21cfb7eb1706b4ec0aac894368d90acf26ebdfb6aced3ebd4ad5bd1eb9c6aa",
        ),
        _movielens(
            *("ml-32m", 200_948, None, 32_000_204, 238_950_008),
            "md5:d472be332d4daa821edc399621853b57",
        ),
        # sha256 of the Beauty files: ShyJason/CaIRec, docs/DATASETS.md (that of the reviews also in other projects).
        _amazon(
            *("amazon-beauty", "Beauty", 22_363, 12_101, 198_502),
            reviews="sha256:e5925ec99023f1dc9c7d3dff7ef34cfeacd40d1b981b5525e1e4ba9c8abc18fe",
            metadata="sha256:c7977dc0e0ead14ac7df8c1c6de74da00e4bebfad87a0f0c5763d4c5bc9b53a0",
        ),
        _amazon("amazon-sports", "Sports_and_Outdoors", 35_598, 18_357, 296_337),
        _amazon("amazon-toys", "Toys_and_Games", 19_412, 11_924, 167_597),
    )
}
