"""Memory of a tree of processes, sampled; and what Ray spilled."""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from data_pipeline.memory import MAX_POINTS, MemorySampler, SpillCounter, TimeLine, role_of, spilled_bytes

MIB = 1 << 20
linux = pytest.mark.skipif(sys.platform != "linux", reason="PSS is Linux's")
HOLDS = "import sys; held = bytearray(b'x') * ({size} << 20); print('ready', flush=True); sys.stdin.read()"
SHARES = """
import mmap, os, sys
held = mmap.mmap(-1, {size} << 20)
held.write(b'x' * ({size} << 20))
for _ in range(3):
    if not os.fork():
        assert held[:].count(b'x'[0]) == {size} << 20
        break
os.write(1, b'ready\\n')  # four processes write: each its line in one piece
sys.stdin.read()
"""
Start = Callable[[str], "subprocess.Popen[str]"]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts a Python script and waits until it says that it is ready; it ends with its standard input."""
    started: list[subprocess.Popen[str]] = []

    def run(script: str, words: int = 1) -> "subprocess.Popen[str]":
        process = subprocess.Popen(
            [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        started.append(process)
        for _ in range(words):
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        return process

    yield run
    for process in started:
        process.communicate("", timeout=20)


def test_a_child_is_seen_and_what_it_held_stays_known(start: Start) -> None:
    with MemorySampler(interval=0.05) as sampler:
        child = start(HOLDS.format(size=80))
        time.sleep(0.3)
        child.communicate("", timeout=20)
        time.sleep(0.2)
    use = sampler.use()
    peaks = {process.pid: process for process in use.processes}
    assert 80 * MIB < peaks[child.pid].bytes < 160 * MIB
    assert peaks[child.pid].role == "other"
    assert use.roles["other"] >= peaks[child.pid].bytes  # more where other tests' Ray runs
    assert max(size for _, size in use.line) == use.peak >= 80 * MIB + use.line[-1][1] / 2
    assert use.line[-1][1] < use.peak - 60 * MIB  # it has ended
    assert sum(process.role == "driver" for process in use.processes) == 1


def test_another_root_without_an_excluded_child(start: Start) -> None:
    nested = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {HOLDS.format(size=60)!r}])"
    root, other = start(nested), start(HOLDS.format(size=40))
    with MemorySampler(root=root.pid, interval=0.05) as sampler:
        time.sleep(0.1)
    pids = {process.pid for process in sampler.use().processes}
    assert root.pid in pids
    assert other.pid not in pids
    assert len(pids) == 2
    (inner,) = pids - {root.pid}
    with MemorySampler(root=root.pid, exclude=[inner], interval=0.05) as sampler:
        time.sleep(0.1)
    assert [process.pid for process in sampler.use().processes] == [root.pid]


@linux
def test_shared_pages_count_once(start: Callable[..., "subprocess.Popen[str]"]) -> None:
    root = start(SHARES.format(size=64), 4)
    with MemorySampler(root=root.pid) as sampler:
        time.sleep(0.1)
    use = sampler.use()
    assert len(use.processes) == 4
    assert use.measure == "PSS"
    assert 64 * MIB < use.peak < 2 * 64 * MIB  # a sum of resident sizes is above 256


@linux
def test_private_memory_is_seen_while_reading_pss_is_too_dear(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_pipeline.memory.CPU_BURST", 0.0)
    monkeypatch.setattr("data_pipeline.memory.CPU_SHARE", 0.0)
    with MemorySampler(interval=0.05) as sampler:
        child = start(HOLDS.format(size=80))
        time.sleep(0.3)
    assert 80 * MIB < {process.pid: process.bytes for process in sampler.use().processes}[child.pid] < 160 * MIB


@pytest.mark.parametrize("count", [1, MAX_POINTS - 1, MAX_POINTS, 10 * MAX_POINTS + 7])
def test_a_time_line_is_bounded_and_keeps_its_peaks(count: int) -> None:
    line = TimeLine()
    for second in range(count):
        line.add(float(second), 1_000_000 if second == count // 2 else second)
    points = line.points()
    assert len(points) <= MAX_POINTS
    assert len(points) >= min(count, MAX_POINTS // 4)
    assert (float(count // 2), 1_000_000) in points
    assert points == tuple(sorted(points))
    assert count < 2 or points[-1][1] >= count - 32


@pytest.mark.parametrize(
    ("line", "role"),
    [
        ("/venv/ray/core/src/ray/gcs/gcs_server --log_dir=/tmp ", "gcs"),
        ("/venv/ray/core/src/ray/raylet/raylet --python_worker_command=python default_worker.py ", "raylet"),
        ("ray::IDLE_SpillWorker  ", "spill worker"),
        ("python -u default_worker.py --worker-type=RESTORE_WORKER ", "spill worker"),
        ("ray::read_block()  ", "worker"),
        ("python default_worker.py --node-ip-address=127.0.0.1 ", "worker"),
        ("ray::DashboardAgent  ", "other"),
        ("python log_monitor.py ", "other"),
    ],
)
def test_roles(line: str, role: str) -> None:
    assert role_of(line) == role


def test_spilled_is_unknown_where_ray_was_not_started_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    assert spilled_bytes() is None
    assert SpillCounter().bytes() is None


@pytest.mark.ray
@pytest.mark.slow
def test_spilled_bytes_and_the_roles_of_ray(tmp_path: Path) -> None:
    """In a process of its own: a store that is too small. 10 objects of 20 MiB, of which 100 MiB hold 5 at most."""
    script = tmp_path / "spill.py"
    script.write_text(
        "import json, numpy, ray\n"
        "from data_pipeline.local_ray import local_ray\n"
        "from data_pipeline.memory import MemorySampler, SpillCounter\n"
        "with MemorySampler() as sampler, local_ray(2, 100 << 20):\n"
        "    spilled = SpillCounter()\n"
        "    before = spilled.bytes()\n"
        "    make = ray.remote(lambda number: numpy.full(20 << 20, number, numpy.uint8))\n"
        "    made = [make.remote(number) for number in range(10)]\n"
        "    ray.wait(made, num_returns=10)\n"
        "    after = spilled.bytes()\n"
        "use = sampler.use()\n"
        "print(json.dumps([before, after, use.roles, use.measure, use.peak, use.sampler_share]))\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=270, check=True)
    before, after, roles, measure, peak, share = json.loads(done.stdout)
    assert before == 0
    assert after >= 5 * 20 * MIB
    assert {"driver", "worker", "raylet", "gcs", "spill worker", "other"} == roles.keys()
    assert peak <= sum(roles.values())
    assert max(roles.values()) < peak
    assert share < 0.1
    assert sys.platform != "linux" or measure == "PSS"
