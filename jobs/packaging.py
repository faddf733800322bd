"""What of the checkout goes to the cluster with a job: the program, without data, runs, tests and caches.

The files are staged in a directory of their own, beside the job's resolved configuration, which so appears neither in
the job's command nor in its metadata.
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from tempfile import TemporaryDirectory

from data_pipeline.errors import GenattError

LIMIT_BYTES = 100 << 20  # of one request to Ray's dashboard (DASHBOARD_CLIENT_MAX_SIZE); zipped it is less
# Paths inside the checkout.
TOP = (
    *("data", "runs", "shards", "shared", "checkpoints", "mlruns", "build", "dist", "tests", "packaging"),
    "benchmarks/results",
)
# Names, wherever they are. A virtual environment is known by its pyvenv.cfg.
ANYWHERE = (".*", "__pycache__", "*.egg-info", "*.parquet", "*.pyc", "*.log", "events.out.tfevents.*")


@dataclass(frozen=True)
class Package:
    """files: paths inside `root`, with their bytes."""

    root: Path
    files: dict[str, int]

    @property
    def bytes(self) -> int:
        return sum(self.files.values())

    def check(self, limit: int = LIMIT_BYTES) -> None:
        """Refuse what Ray would refuse after the upload. Raises GenattError naming the biggest directories."""
        if self.bytes <= limit:
            return
        sizes: Counter[str] = Counter()
        for path, size in self.files.items():
            sizes[path.split("/")[0]] += size
        biggest = ", ".join(f"{name} ({megabytes(size)})" for name, size in sizes.most_common(3))
        raise GenattError(
            f"working directory {self.root} has {megabytes(self.bytes)}, Ray takes {megabytes(limit)}: name what the "
            f"job does not need by --exclude; the biggest are {biggest}"
        )

    @contextmanager
    def staged(self, documents: Mapping[str, str]) -> Iterator[Path]:
        """A directory with these files, and the documents (text by name) beside them."""
        with TemporaryDirectory(prefix="genatt-job-") as directory:
            target = Path(directory) / "package"
            for path in self.files:
                place = target / path
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(self.root / path, place)
            for name, text in documents.items():
                (target / name).write_text(text)
            yield target


def checkout() -> Path:
    """Where this program lies with its configs. Raises GenattError where it was installed without them."""
    root = Path(__file__).resolve().parents[1]
    if not (root / "pyproject.toml").exists():
        raise GenattError(
            f"{root} is no checkout of genatt-dist (no pyproject.toml): jobs take the program along, so submit them "
            "from one (`make setup` in a clone)"
        )
    return root


def survey(root: Path, exclude: Sequence[str] = ()) -> Package:
    """The files that go along. exclude: further paths or patterns of names, as in `TOP` and `ANYWHERE`."""
    files: dict[str, int] = {}
    for directory, folders, names in os.walk(root):
        inside = os.path.relpath(directory, root)
        prefix = "" if inside == "." else f"{inside}/"
        folders[:] = sorted(
            name
            for name in folders
            if not _left_out(f"{prefix}{name}", exclude) and not os.path.exists(f"{directory}/{name}/pyvenv.cfg")
        )
        for name in sorted(names):
            path = f"{prefix}{name}"
            if not _left_out(path, exclude) and os.path.isfile(root / path):  # a link may lead nowhere
                files[path] = os.path.getsize(root / path)
    return Package(root, files)


def megabytes(size: int) -> str:
    """Bytes in words."""
    return f"{size / 2**20:,.1f} MiB"


def _left_out(path: str, exclude: Sequence[str]) -> bool:
    name = path.rpartition("/")[2]
    if path in TOP or any(fnmatch(name, pattern) for pattern in ANYWHERE):
        return True
    return any(fnmatch(path, pattern.rstrip("/")) or fnmatch(name, pattern.rstrip("/")) for pattern in exclude)
