"""The queue: each arm in a process of its own, some at a time, finished ones skipped, failed ones recorded.

The state of an arm is read from its files, so a study may be stopped in any way and started again. Processes are ended
by their ids, and a lock that they inherit keeps a second queue out while one of them lives.
"""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import psutil

from data_pipeline import format as shards
from data_pipeline.errors import GenattError
from genatt_dist import runs
from genatt_dist.launch.launchers import worker_environment
from genatt_dist.study import plan
from genatt_dist.study.paths import PLAN, calibration_of, finished, log_of, read_json, round_of, run_of
from genatt_dist.study.plan import Study

_ARM = "genatt_dist.study.arm"
_POLL_SECONDS = 1.0
_GRACE_SECONDS = 30  # an arm's launcher takes up to 20 to end its workers
# What an arm may take beyond its training: starting, validation of the last epoch, calibration, evaluation.
_BESIDE_TRAINING_SECONDS = 3600
_UNLIMITED_TRAINING_SECONDS = 7 * 86_400

_ERROR = "error: "

WAITING, RUNNING, DONE, FAILED = "waiting", "running", "done", "failed"


@dataclass
class Job:
    """An arm in the queue. seconds: wall time in this queue; error: one line, of a failed one."""

    name: str
    needs: tuple[str, ...]
    limit: float
    environment: dict[str, str]
    state: str = WAITING
    error: str | None = None
    started: float = 0.0
    ended: float = 0.0
    process: subprocess.Popen[bytes] | None = None

    @property
    def seconds(self) -> float:
        return (self.ended or time.monotonic()) - self.started if self.started else 0.0


def run(
    study: Study,
    out: Path,
    names: Sequence[str],
    jobs: int,
    watch: Callable[[Sequence[Job]], None] = lambda jobs: None,
) -> list[Job]:
    """Bring the arms `names` to their test metrics, `jobs` at a time, each with its part of the cores.

    watch: called with all jobs about once a second and once at the end.
    Returns the jobs, each done or failed. Raises GenattError before anything starts: an arm that was begun with another
    configuration, an arm whose needs are neither named nor finished, missing data, a directory in use.
    """
    check(study, out, names)
    out.mkdir(parents=True, exist_ok=True)
    with _lock(out) as lock:
        _write_plan(study, out)
        queue = [_job(study, out, name, jobs) for name in names]
        try:
            with _sigterm_raises():
                while any(job.state in (WAITING, RUNNING) for job in queue):
                    _step(queue, out, jobs, lock)
                    watch(queue)
                    if any(job.state == RUNNING for job in queue):
                        time.sleep(_POLL_SECONDS)
        finally:
            for job in queue:
                if job.process is not None and job.process.poll() is None:
                    _end(job.process)
    watch(queue)
    return queue


def check(study: Study, out: Path, names: Sequence[str]) -> None:
    """Whether these arms can be begun, or gone on with, in `out`. Reads only."""
    for name in names:
        if name not in study.arms:
            raise GenattError(f"--arms names {name!r}, which is no arm: use {', '.join(study.arms)}")
        for needed in study.arms[name].needs:
            if needed not in names and not finished(out, needed):
                raise GenattError(f"arm {name} needs arm {needed}, which is not finished in {out}: add it to --arms")
        shards.load_manifest(study.config(name).data.path)
    for name in study.arms:
        check_unchanged(study, out, name)


def check_unchanged(study: Study, out: Path, name: str) -> None:
    """Whether what was begun of an arm in `out` has the configuration that the study gives it."""
    arm = study.arms[name]
    begun: list[tuple[Path, float | None]] = [(run_of(out, name), None)]
    if arm.match_noise:
        record = read_json(calibration_of(out, name)) or {}
        _same(out, name, record.get("settings", {}), arm.match_noise.model_dump(mode="json") if record else {})
        rounds = [one["noise"] for one in record.get("rounds", [])]
        begun = [(run_of(out, name), record.get("noise"))]
        begun += [(round_of(out, name, number), noise) for number, noise in enumerate(rounds, 1)]
    for path, noise in begun:
        if (path / runs.CONFIG).exists():
            theirs, ours = runs.read_config(path), study.config(name, noise)
            _same(out, name, theirs.model_dump(mode="json"), ours.model_dump(mode="json"))


def _same(out: Path, name: str, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    was, now = _flat(theirs), _flat(ours)
    changed = [key for key in sorted(was.keys() | now.keys()) if was.get(key) != now.get(key)]
    if changed:
        shown = ", ".join(f"{key} was {was.get(key)!r}, is {now.get(key)!r}" for key in changed[:3])
        raise GenattError(
            f"arm {name} of {out} was begun with another configuration: {shown}; keep it, choose another --out, or "
            f"remove what was begun of {name} there"
        )


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _write_plan(study: Study, out: Path) -> None:
    temporary = out / f".{PLAN}"
    temporary.write_text(plan.dump(study))
    temporary.rename(out / PLAN)


def _job(study: Study, out: Path, name: str, jobs: int) -> Job:
    config, arm = study.config(name), study.arms[name]
    training = config.training.max_seconds or _UNLIMITED_TRAINING_SECONDS
    # An epoch that was begun is ended: at most twice the cap, for any cap that makes sense.
    limit = 2 * training * (arm.match_noise.rounds if arm.match_noise else 1) + _BESIDE_TRAINING_SECONDS
    environment = worker_environment(os.environ, jobs * config.world_size)
    return Job(name, arm.needs, limit, environment, DONE if finished(out, name) else WAITING)


def _step(queue: Sequence[Job], out: Path, jobs: int, lock: IO[str]) -> None:
    """End what has ended, start what may start."""
    named = {job.name: job for job in queue}
    for job in queue:
        before = [named[name] for name in job.needs if name in named]  # what is not here was finished before
        failed = [other.name for other in before if other.state == FAILED]
        if job.state == RUNNING:
            _look_at(job, out)
        elif job.state == WAITING and failed:
            job.state, job.error = FAILED, f"needs {', '.join(failed)}, which failed"
        elif (
            job.state == WAITING
            and all(other.state == DONE for other in before)
            and sum(other.state == RUNNING for other in queue) < jobs
        ):
            _start(job, out, lock)


def _start(job: Job, out: Path, lock: IO[str]) -> None:
    log = log_of(out, job.name)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        # A session of its own: Ctrl-C reaches the queue alone, which then ends its arms in order.
        job.process = subprocess.Popen(
            [sys.executable, "-m", _ARM, str(out), job.name],
            env=job.environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=(lock.fileno(),),
        )
    job.state, job.started = RUNNING, time.monotonic()
    print(f"{job.process.pid} {job.name}", file=lock, flush=True)


def _look_at(job: Job, out: Path) -> None:
    assert job.process is not None
    code = job.process.poll()
    if code is None and job.seconds <= job.limit:
        return
    if code is None:
        _end(job.process)
        job.error = f"was ended after {job.seconds:,.0f} s, more than its training.max_seconds allows for"
    elif code or not finished(out, job.name):
        job.error = _last_error(log_of(out, job.name)) or f"ended with exit code {code}"
    job.state, job.ended = FAILED if job.error else DONE, time.monotonic()


def _last_error(log: Path) -> str:
    """What an arm said of its failure. Where its worker told the reason, that is the line before the arm's own."""
    *_, before, last = ["", "", *(line for line in log.read_text(errors="replace").splitlines() if line.strip())]
    return (before if before.startswith(_ERROR) else last).removeprefix(_ERROR)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End an arm politely, so that it ends its workers; then for certain, with whatever it had started."""
    try:
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        family = []
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(_GRACE_SECONDS)
    for member in family:
        if member.is_running():  # psutil compares start times too: the id may have passed to another process
            member.kill()
    process.wait(_GRACE_SECONDS)


@contextmanager
def _lock(out: Path) -> Iterator[IO[str]]:
    """The directory for this queue alone. Arms inherit the lock: one that outlived its queue still holds it."""
    file = (out / ".lock").open("a+")
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            raise GenattError(
                f"{out} is in use by another `genatt study`, or by an arm that one left: wait, or end the process "
                f"(started there: {'; '.join(file.read().split(chr(10))).strip('; ')})"
            ) from None
        file.truncate(0)
        print(f"{os.getpid()} queue", file=file, flush=True)
        yield file
    finally:
        file.close()


@contextmanager
def _sigterm_raises() -> Iterator[None]:
    """A plain `kill` of the queue ends its arms too, as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread may ask for signals
        yield
        return
    previous = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
