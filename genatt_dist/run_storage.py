"""A run directory on object storage: its small files lie on a node's disk and are mirrored to a URL while it trains.

What appends to metrics.jsonl or writes TensorBoard needs a file system, which object storage is not. So rank 0 writes
to a directory of its own, and every few seconds what changed there goes to the URL, whole files at a time: a store
shows an object whole or not at all. Checkpoints are not mirrored: they go straight to URL/checkpoints (`stored_at`),
because no disk has to hold them and a run goes on from them on another node.

The same holds for every fsspec URL; a local path needs none of this.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from data_pipeline.errors import GenattError
from data_pipeline.filesystems import explaining, filesystem
from data_pipeline.redaction import redact
from data_pipeline.storage import read_bytes, write_bytes
from genatt_dist.config import RunConfig

CHECKPOINTS = "checkpoints"
EVERY_SECONDS = 5.0
_END_SECONDS = 120.0  # for a publication that is under way when the run ends
_SEND_SECONDS = 5.0  # for one under way before a checkpoint, which has a time limit of its own


def is_url(run: str | Path) -> bool:
    """Whether a run directory is an fsspec URL such as s3://bucket/runs/a."""
    return "://" in str(run)


def stored_at(config: RunConfig, url: str) -> RunConfig:
    """The configuration of a run at `url`: its checkpoints lie there too, unless it says where."""
    if config.training.checkpoint.path is not None:
        return config
    checkpoint = config.training.checkpoint.model_copy(update={"path": f"{url.rstrip('/')}/{CHECKPOINTS}"})
    training = config.training.model_copy(update={"checkpoint": checkpoint})
    return config.model_copy(update={"training": training})


def names(url: str) -> list[str]:
    """Paths of the run's small files inside `url`; none where nothing is. Raises GenattError: no access."""
    fs, root = filesystem(url.rstrip("/"))
    with explaining(url, "read"), suppress(FileNotFoundError):
        found = (path.removeprefix(f"{root}/") for path in fs.find(root))
        return sorted(name for name in found if _mirrored(Path(name)))
    return []


def fetch(url: str, run: Path) -> None:
    """Bring the run's small files from `url` to the directory `run`, over what is there. Raises GenattError."""
    run.mkdir(parents=True, exist_ok=True)
    for name in names(url):
        content = read_bytes(f"{url.rstrip('/')}/{name}")
        place = run / name
        place.parent.mkdir(parents=True, exist_ok=True)
        temporary = place.with_name(f".{place.name}.fetched")
        temporary.write_bytes(content)
        temporary.rename(place)


def remove(url: str, name: str) -> None:
    """Remove one small file of the run, if it is there."""
    fs, path = filesystem(f"{url.rstrip('/')}/{name}")
    with explaining(url, "write"), suppress(FileNotFoundError):
        fs.rm(path)


class Mirror:
    """What of a directory has gone to its URL, and in which state."""

    def __init__(self, url: str, run: Path) -> None:
        self._url, self._run = url.rstrip("/"), run
        self._published: dict[str, tuple[int, int]] = {}
        self._lock = threading.Lock()

    def publish(self, limit: float = _END_SECONDS) -> None:
        """Send each file that is new or changed, and remove what has gone. limit: seconds to wait for one under way.

        Raises GenattError; what was not sent is sent the next time.
        """
        if not self._lock.acquire(timeout=limit):
            raise GenattError(f"cannot write {redact(self._url)}: it has not answered for {limit:.0f} s")
        try:
            with explaining(self._url, "write"):
                self._publish()
        finally:
            self._lock.release()

    def _publish(self) -> None:
        here: dict[str, tuple[int, int]] = {}
        for path in self._run.rglob("*"):
            inner = path.relative_to(self._run)
            with suppress(FileNotFoundError):  # renamed or removed meanwhile
                if _mirrored(inner) and path.is_file():
                    status = path.stat()
                    here[inner.as_posix()] = (status.st_mtime_ns, status.st_size)
        for name, state in here.items():
            if self._published.get(name) != state:
                with suppress(FileNotFoundError):
                    content = (self._run / name).read_bytes()
                    write_bytes(f"{self._url}/{name}", content)
                    self._published[name] = state  # of before the reading: what came since goes the next time
        for name in self._published.keys() - here.keys():
            remove(self._url, name)
            del self._published[name]


_mirrors: dict[Path, Mirror] = {}  # of this process, while they are kept


def send(run: Path) -> None:
    """Have at the URL what the run's files say now, before a checkpoint counts: who goes on from it writes no line
    again that came before it. Nothing for a run without a URL; a store that does not answer gets it the next time.
    """
    if mirror := _mirrors.get(run):
        with suppress(GenattError):
            mirror.publish(_SEND_SECONDS)


@contextmanager
def mirrored(url: str, run: Path, every: float = EVERY_SECONDS) -> Iterator[None]:
    """Keep `url` as `run` is, while the block runs and once more after it.

    A store that does not answer is told once and tried again; training never waits for it. Raises GenattError after a
    block that ended well, where the last state could not be sent.
    """
    mirror, end = Mirror(url, run), threading.Event()

    def watch() -> None:
        told = False
        while not end.wait(every):
            try:
                mirror.publish()
                told = False
            except GenattError as error:
                if not told:
                    print(f"note: {redact(url)} is behind: {error}", file=sys.stderr, flush=True)
                told = True

    _mirrors[run] = mirror
    thread = threading.Thread(target=watch, name="run mirror", daemon=True)
    thread.start()
    failed = True
    try:
        yield
        failed = False
    finally:
        end.set()
        thread.join(_END_SECONDS)
        del _mirrors[run]
        try:
            mirror.publish()
        except GenattError as error:
            if not failed:
                raise
            print(f"note: {redact(url)} is behind: {error}", file=sys.stderr, flush=True)  # what failed is the news


def _mirrored(name: Path) -> bool:
    """Whether a file of a run directory is one of its small ones. Those that begin with a dot are not finished."""
    return name.parts[0] != CHECKPOINTS and not any(part.startswith(".") for part in name.parts)
