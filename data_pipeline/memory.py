"""How much memory a preparation took: every process of it, sampled by a thread, and what Ray spilled to disk.

Shared pages are what makes this hard: each worker maps Ray's object store, so sums of resident sizes count it many
times. The proportional size (PSS) of Linux shares each page among those who map it, so its sum is what the machine
holds. But reading it takes milliseconds a process, tens of them where much is mapped. So each sample reads the sizes
that are cheap (resident, shared), and takes a process's size as its last PSS and what its private memory grew by since;
the PSS itself is read again when shared memory moved, as often as the sampler's share of the CPU allows.
"""

import os
import threading
import time
from collections.abc import Collection
from dataclasses import dataclass

import psutil

from data_pipeline.ray_head import RayHead

INTERVAL = 0.25  # seconds between samples
CPU_SHARE = 0.015  # of a core that reading PSS may bring the sampler to
CPU_BURST = 0.1  # CPU seconds it may be ahead of that: a short preparation is measured as well
MAX_POINTS = 500  # of the time line
_TOLERANCE = 1 << 20  # bytes of shared memory that have to move before PSS is read again
_REFRESH = 5.0  # seconds after which it is read again whatever happened
_JOIN_SECONDS = 10.0
_RAY_SECONDS = 5.0  # that Ray may take to answer

# Looked for in this order in the command line: that of the raylet holds the command of its workers, and Ray renames
# those (`ray::read_block`, `ray::IDLE_SpillWorker`).
ROLES = (
    ("/gcs/gcs_server ", "gcs"),
    ("/raylet/raylet ", "raylet"),
    ("SpillWorker", "spill worker"),
    ("RestoreWorker", "spill worker"),
    ("SPILL_WORKER", "spill worker"),
    ("RESTORE_WORKER", "spill worker"),
    ("ray::DashboardAgent", "other"),
    ("ray::RuntimeEnvAgent", "other"),
    ("ray::", "worker"),
    ("default_worker.py", "worker"),
)


@dataclass(frozen=True)
class ProcessPeak:
    """The most that one process held."""

    pid: int
    role: str
    bytes: int


@dataclass(frozen=True)
class MemoryUse:
    """What a `MemorySampler` saw; sizes in bytes.

    measure: "PSS", or what stood in for it where it could not be read ("USS", "RSS": sums of RSS count shared pages
    more than once). peak: of the sum over all processes. roles: peak of each role's sum, largest first; they need not
    fall together. processes: largest first. line: (seconds since the start, sum), at most `MAX_POINTS`, the largest of
    the samples each point stands for. sampler_share: CPU seconds of the sampler a second.
    """

    measure: str
    peak: int
    roles: dict[str, int]
    processes: tuple[ProcessPeak, ...]
    line: tuple[tuple[float, int], ...]
    samples: int
    seconds: float
    sampler_share: float


class MemorySampler:
    """Samples `root` (default: this process) and all its descendants, as long as the block lasts.

    Parameters
    ----------
    exclude
        Processes that are left out, with their descendants.
    interval
        Seconds between samples.
    """

    def __init__(self, root: int | None = None, exclude: Collection[int] = (), interval: float = INTERVAL) -> None:
        self._root = root or os.getpid()
        self._exclude = frozenset(exclude)
        self._interval = interval
        self._tree: dict[int, _Process] = {}
        self._seen: set[int] = set()
        self._peaks: dict[psutil.Process, ProcessPeak] = {}
        self._roles: dict[str, int] = {}
        self._measures: set[str] = set()
        self._peak = 0
        self._line = TimeLine()
        self._samples = 0
        self._cpu = 0.0
        self._began = self._ended = time.perf_counter()
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="memory-sampler", daemon=True)

    def __enter__(self) -> "MemorySampler":
        self._began = self._ended = time.perf_counter()
        self._sample()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(_JOIN_SECONDS)
        self._sample()

    def use(self) -> MemoryUse:
        """What was seen up to now."""
        with self._lock:
            seconds = self._ended - self._began
            return MemoryUse(
                measure=" and ".join(sorted(self._measures)),
                peak=self._peak,
                roles=dict(sorted(self._roles.items(), key=lambda item: -item[1])),
                processes=tuple(sorted(self._peaks.values(), key=lambda peak: -peak.bytes)),
                line=self._line.points(),
                samples=self._samples,
                seconds=seconds,
                sampler_share=self._cpu / seconds if seconds > 0 else 0.0,
            )

    def _run(self) -> None:
        while not self._stop.wait(self._interval):
            self._sample()

    def _sample(self) -> None:
        cpu, now = time.thread_time(), time.perf_counter()
        with self._lock:
            self._find()
            self._tree = {pid: process for pid, process in self._tree.items() if process.look()}
            if self._cpu <= CPU_BURST + CPU_SHARE * (now - self._began):
                moved = any(process.shared_moved for process in self._tree.values())
                # All that are stale at once: pages shared between two of them are to be counted once.
                for process in [process for process in self._tree.values() if process.stale(now, moved)]:
                    self._measures |= {process.measure(now)} - {""}
            sums: dict[str, int] = {}
            for process in self._tree.values():
                sums[process.role] = sums.get(process.role, 0) + process.size
                before = self._peaks.get(process.handle)
                peak = max(process.size, before.bytes if before else 0)
                self._peaks[process.handle] = ProcessPeak(process.handle.pid, process.role, peak)
            for role, size in sums.items():
                self._roles[role] = max(self._roles.get(role, 0), size)
            total = sum(sums.values())
            self._peak = max(self._peak, total)
            self._line.add(round(now - self._began, 3), total)
            self._samples += 1
            self._ended = time.perf_counter()
            self._cpu += time.thread_time() - cpu

    def _find(self) -> None:
        """Adds new descendants. Only processes not seen before are asked for their parent: that is most of the cost."""
        pids = set(psutil.pids()) | {self._root}
        self._seen &= pids
        parents: dict[int, tuple[int, psutil.Process]] = {}
        for pid in pids - self._seen - self._exclude:
            try:
                handle = psutil.Process(pid)
                parents[pid] = (handle.ppid(), handle)
            except psutil.Error:  # gone again, or not ours to see
                continue
        self._seen |= pids
        if self._root in parents and self._root not in self._tree:
            self._tree[self._root] = _Process(parents[self._root][1], "driver")
        while found := [pid for pid, (parent, _) in parents.items() if parent in self._tree and pid not in self._tree]:
            self._tree |= {pid: _Process(parents[pid][1]) for pid in found}


class TimeLine:
    """Sizes over time in at most `MAX_POINTS` points, each the largest of the samples it stands for."""

    def __init__(self) -> None:
        self._points: list[tuple[float, int]] = []
        self._pending: list[tuple[float, int]] = []  # of the point to come
        self._stride = 1  # samples to a point

    def add(self, seconds: float, size: int) -> None:
        """A sample, later than those before it."""
        self._pending.append((seconds, size))
        if len(self._pending) < self._stride:
            return
        self._points.append(max(self._pending, key=_size))
        self._pending = []
        if len(self._points) == MAX_POINTS:
            self._points = [max(self._points[at : at + 2], key=_size) for at in range(0, MAX_POINTS, 2)]
            self._stride *= 2

    def points(self) -> tuple[tuple[float, int], ...]:
        """(seconds, size) of all points."""
        return (*self._points, *([max(self._pending, key=_size)] if self._pending else []))


@dataclass
class _Process:
    """One process of the tree, and what was last known of it."""

    handle: psutil.Process
    role: str = "other"
    private: int = 0
    shared: int = 0
    first_shared: int | None = None
    measured: float = float("-inf")
    measured_size: int = 0
    measured_private: int = 0
    measured_shared: int = 0

    @property
    def size(self) -> int:
        """The last PSS, and what private memory grew by since."""
        return max(0, self.measured_size + self.private - self.measured_private)

    @property
    def shared_moved(self) -> bool:
        return abs(self.shared - self.measured_shared) > _TOLERANCE

    def look(self) -> bool:
        """Reads what is cheap to read; False when the process has ended."""
        try:
            info = self.handle.memory_info()
        except psutil.AccessDenied:
            return True
        except psutil.Error:
            return False
        self.shared = getattr(info, "shared", 0)
        self.private = info.rss - self.shared
        self.first_shared = self.shared if self.first_shared is None else self.first_shared
        return True

    def stale(self, now: float, moved: bool) -> bool:
        """Must the PSS be read again? It also moves with what others do to pages that this process shares."""
        maps_objects = self.shared - (self.first_shared or 0) > _TOLERANCE
        return self.shared_moved or now - self.measured > _REFRESH or (moved and maps_objects)

    def measure(self, now: float) -> str:
        """Reads PSS, or else USS or RSS, and returns which; and the role, which Ray gives a worker after its start."""
        measured, size, line = "RSS", self.private + self.shared, ""
        try:
            line = " ".join([*self.handle.cmdline(), ""])
            full = self.handle.memory_full_info()
            measured = "PSS" if hasattr(full, "pss") else "USS"
            size = full.pss if hasattr(full, "pss") else full.uss
        except psutil.AccessDenied:
            pass
        except psutil.Error:  # it has just ended
            measured, size = "", 0
        if line.strip() and self.role != "driver":  # a process that ends has no command line any more
            self.role = role_of(line)
        self.measured, self.measured_size = now, size
        self.measured_private, self.measured_shared = self.private, self.shared
        return measured


def role_of(line: str) -> str:
    """The role of a process with this command line, each argument followed by a space."""
    return next((role for mark, role in ROLES if mark in line), "other")


def _size(point: tuple[float, int]) -> int:
    return point[1]


class SpillCounter:
    """Bytes Ray wrote to disk for lack of memory, from when this was made; needs no dashboard."""

    def __init__(self) -> None:
        self._before = spilled_bytes()

    def bytes(self) -> int | None:
        """Up to now; None where it is not known."""
        now = spilled_bytes()
        return None if now is None or self._before is None else now - self._before


def spilled_bytes() -> int | None:
    """Bytes that the Ray this process started has spilled since then.

    None without Ray, on a cluster that others started (its counters are everybody's), or when Ray does not answer.
    """
    import ray

    if not ray.is_initialized() or RayHead.running is None:
        return None
    # Not public, but all that works without the dashboard: what `ray memory --stats-only` asks the raylet for.
    from ray._private.internal_api import get_memory_info_reply

    try:
        own = next(entry for entry in ray.nodes() if entry["Alive"])
        reply = get_memory_info_reply(
            None, own["NodeManagerAddress"], own["NodeManagerPort"], timeout_seconds=_RAY_SECONDS
        )
        return int(reply.store_stats.spilled_bytes_total)
    except Exception:  # grpc's own, Ray's own: a number for a report must not fail a preparation
        return None
