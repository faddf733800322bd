"""The queue: each arm in a process of its own, some at a time, finished ones skipped, failed ones recorded.

The state of an arm is read from its files, so a study may be stopped in any way and started again. Processes are ended
by their ids, and a lock that they inherit keeps a second queue out while one of them lives.
"""

from __future__ import annotations

import fcntl
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import psutil

from data_pipeline import format as shards
from data_pipeline.errors import GenattError
from genatt_dist import runs
from genatt_dist.launch.launchers import worker_environment
from genatt_dist.study import plan
from genatt_dist.study.paths import (
    PLAN,
    calibration_of,
    finished,
    inferences_left,
    log_of,
    read_json,
    refuse_foreign,
    round_of,
    run_of,
)
from genatt_dist.study.plan import Study

_ARM = "genatt_dist.study.arm"
_POLL_SECONDS = 1.0
_GRACE_SECONDS = 30  # an arm's launcher takes up to 20 to end its workers
# What an arm may take beyond its training: starting, validation of the last epoch, calibration, evaluation.
_BESIDE_TRAINING_SECONDS = 3600
_UNLIMITED_TRAINING_SECONDS = 7 * 86_400

_GONE_SECONDS = 5  # what a killed process may take to be gone
_LOOK_SECONDS = 0.05

_ERROR, _LAUNCHER_ERROR = "error: ", "its messages are above"
_TRACEBACK = "Traceback (most recent call last):"
_RANK = re.compile(r"^\[rank\d+\]: ?")  # what torch puts before each line of a traceback
_STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

WAITING, RUNNING, DONE, FAILED = "waiting", "running", "done", "failed"


@dataclass
class Job:
    """An arm in the queue. seconds: wall time in this queue; error: one line, of a failed one.

    family: what its process was last seen to have started; log_begin: bytes that earlier processes of the arm printed.
    """

    name: str
    needs: tuple[str, ...]
    limit: float
    environment: dict[str, str]
    state: str = WAITING
    error: str | None = None
    started: float = 0.0
    ended: float = 0.0
    process: subprocess.Popen[bytes] | None = None
    family: set[psutil.Process] = field(default_factory=set)
    log_begin: int = 0

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
    with _lock(out) as lock, _signals_noted() as raise_noted:
        _write_plan(study, out)
        queue = [_job(study, out, name, jobs) for name in names]
        try:
            while any(job.state in (WAITING, RUNNING) for job in queue):
                _step(queue, study, out, jobs, lock)
                watch(queue)
                if any(job.state == RUNNING for job in queue):
                    time.sleep(_POLL_SECONDS)
                raise_noted()
        finally:
            _end([job for job in queue if job.state == RUNNING])
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
        refuse_foreign(path)
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
    try:
        temporary.write_text(plan.dump(study))
        temporary.rename(out / PLAN)
    except OSError as error:
        raise _unwritable(out, error) from None


def _unwritable(out: Path, error: OSError) -> GenattError:
    return GenattError(f"cannot write study directory {out}: {error.strerror}; choose another --out")


def _job(study: Study, out: Path, name: str, jobs: int) -> Job:
    config, arm = study.config(name), study.arms[name]
    training = config.training.max_seconds or _UNLIMITED_TRAINING_SECONDS
    # An epoch that was begun is ended: at most twice the cap, for any cap that makes sense.
    limit = 2 * training * (arm.match_noise.rounds if arm.match_noise else 1) + _BESIDE_TRAINING_SECONDS
    environment = worker_environment(os.environ, jobs * config.world_size)
    return Job(name, arm.needs, limit, environment, DONE if _complete(study, out, name) else WAITING)


def _complete(study: Study, out: Path, name: str) -> bool:
    """Whether nothing is left to do for the arm: other inferences may be asked for after it was finished."""
    return finished(out, name) and not inferences_left(run_of(out, name), study.arms[name].also_infer)


def _step(queue: Sequence[Job], study: Study, out: Path, jobs: int, lock: IO[str]) -> None:
    """End what has ended, start what may start."""
    named = {job.name: job for job in queue}
    for job in queue:
        before = [named[name] for name in job.needs if name in named]  # what is not here was finished before
        failed = [other.name for other in before if other.state == FAILED]
        if job.state == RUNNING:
            _look_at(job, study, out)
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
        job.log_begin = file.tell()
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


def _look_at(job: Job, study: Study, out: Path) -> None:
    assert job.process is not None
    code = job.process.poll()
    if code is None and job.seconds <= job.limit:
        _see_family(job)
        return
    _end([job])  # also what an arm that is gone has left
    if code is None:
        job.error = f"was ended after {job.seconds:,.0f} s, more than its training.max_seconds allows for"
    elif code or not _complete(study, out, job.name):
        job.error = _reason(log_of(out, job.name), job.log_begin) or _ending(code)
    job.state, job.ended = FAILED if job.error else DONE, time.monotonic()


def _reason(log: Path, begin: int) -> str | None:
    """What an arm that began at byte `begin` of the log said of its failure: the last `error:` line, or the last line
    of a traceback. A launcher's word that its worker failed gives way to the worker's own.
    """
    with log.open("rb") as file:
        file.seek(begin)
        lines = file.read().decode(errors="replace").splitlines()
    reasons: list[str] = []
    in_traceback = False
    for line in (_RANK.sub("", line) for line in lines):
        if line.startswith(_ERROR):
            reasons.append(line.removeprefix(_ERROR))
        elif line.startswith(_TRACEBACK):
            in_traceback = True
        elif in_traceback and line.strip() and not line[0].isspace():
            reasons.append(line)
            in_traceback = False
    if len(reasons) > 1 and reasons[-1].endswith(_LAUNCHER_ERROR):
        reasons.pop()
    return reasons[-1] if reasons else None


def _ending(code: int) -> str:
    if code < 0:
        return f"ended by signal {-code}"
    return f"ended with exit code {code}" + ("" if code else ", but without its results")


def _see_family(job: Job) -> None:
    """Note what the arm has started while it lives: of one that was killed, nobody can tell any more."""
    assert job.process is not None
    with suppress(psutil.Error):
        seen = psutil.Process(job.process.pid).children(recursive=True)
        job.family = {member for member in job.family if member.is_running()} | set(seen)


def _end(jobs: Sequence[Job]) -> None:
    """End arms politely and all at one time, so that each ends its workers; then for certain, with all they started."""
    processes = [job.process for job in jobs if job.process is not None]
    for job in jobs:
        if job.process is not None and job.process.poll() is None:
            _see_family(job)
            job.process.terminate()
    deadline = time.monotonic() + _GRACE_SECONDS
    for process in processes:
        with suppress(subprocess.TimeoutExpired):
            process.wait(max(_LOOK_SECONDS, deadline - time.monotonic()))
        if process.poll() is None:
            process.kill()
            process.wait(_GRACE_SECONDS)
    _kill([member for job in jobs for member in job.family])


def _kill(members: Sequence[psutil.Process]) -> None:
    """psutil compares start times too: an id that passed to another process is left alone."""
    deadline = time.monotonic() + _GONE_SECONDS
    while (living := [member for member in members if _lives(member)]) and time.monotonic() < deadline:
        for member in living:
            with suppress(psutil.Error):
                member.kill()
        time.sleep(_LOOK_SECONDS)


def _lives(member: psutil.Process) -> bool:
    try:
        return member.is_running() and member.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


@contextmanager
def _lock(out: Path) -> Iterator[IO[str]]:
    """The directory for this queue alone. Arms inherit the lock: one that outlived its queue still holds it."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        file = (out / ".lock").open("a+")
    except OSError as error:
        raise _unwritable(out, error) from None
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
def _signals_noted() -> Iterator[Callable[[], None]]:
    """A plain `kill` or a lost terminal ends the queue and its arms, as Ctrl-C does.

    Signals are noted, and raised where the queue calls what this yields: none comes between an arm's start and its
    entry in the queue, and none while the arms are being ended. One that is ignored here (nohup) stays so.
    """
    noted: list[int] = []

    def raise_noted() -> None:
        if signal.SIGINT in noted:
            raise KeyboardInterrupt
        if noted:
            sys.exit(128 + noted[0])

    previous: dict[signal.Signals, Any] = {}
    if threading.current_thread() is threading.main_thread():  # only the main thread may ask for signals
        previous = {one: signal.getsignal(one) for one in _STOPPING if signal.getsignal(one) != signal.SIG_IGN}
    for one in previous:
        signal.signal(one, lambda number, _: noted.append(number))
    try:
        yield raise_noted
    finally:
        for one, handler in previous.items():
            signal.signal(one, handler)
