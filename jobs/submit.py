"""Submit a job to a cluster once, and follow it.

A job belongs to a run directory. While one for it is pending or running there, submitting it again follows that one; a
job that has ended gets another attempt, which goes on from what its stages left in the run directory. The id names run
and attempt, so that of two submissions at one time Ray takes one, and the other follows it.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from ray.job_submission import JobDetails

from data_pipeline.errors import GenattError
from data_pipeline.redaction import redact
from jobs import client as api
from jobs import options, packaging
from jobs.benchmark import check
from jobs.driver import DOCUMENT

_NAME_LENGTH = 40
_STOP_MARGIN_SECONDS = 30  # beside training.stop_seconds, until Ray kills a job that was asked to stop
_STOP_VARIABLE = "RAY_JOB_STOP_WAIT_TIME_S"  # read by Ray's supervisor of the job


@dataclass(frozen=True)
class Job:
    """What is submitted. environment: variables of all of its processes; their values are never shown."""

    kind: str
    run: str
    config: dict[str, Any] = field(repr=False)
    environment: dict[str, str] = field(default_factory=dict, repr=False)
    num_cpus: float = 0.0

    @property
    def document(self) -> str:
        """What the entry point reads (`jobs.driver`)."""
        return yaml.safe_dump({"run": self.run, "config": self.config}, sort_keys=False)

    @property
    def metadata(self) -> dict[str, str]:
        """What everybody sees beside the job."""
        return {"job": self.kind, "run": redact(self.run), "config": _hash(self.document)}

    @property
    def name(self) -> str:
        """The id without its attempt: kind, and the run by its last name and a hash of all of it."""
        last = re.sub(r"[^a-z0-9]+", "-", redact(self.run).rstrip("/").rpartition("/")[2].lower()).strip("-")
        return f"genatt-{self.kind}-{last[:_NAME_LENGTH] or 'run'}-{_hash(self.run)}"


@dataclass(frozen=True)
class Submitted:
    """id: of the job; attached: whether it was at work already."""

    id: str
    attached: bool


def job_of(
    kind: str,
    config: Path | None,
    overrides: Sequence[str],
    run: str,
    variables: Sequence[str] = (),
    num_cpus: float = 0.0,
) -> Job:
    """The job as asked for. variables: names that are passed on from this environment. Raises GenattError."""
    options.check_kind(kind)
    if config is None and kind != "evaluate":
        raise GenattError(f"job {kind} needs a CONFIG: name its YAML file, for example from configs/")
    run = options.absolute(run).rstrip("/")
    resolved = options.load(kind, config, overrides, run)
    if kind == "benchmark":
        check(options.of_benchmark(resolved))
    environment = {}
    for name in variables:
        if not re.fullmatch(r"[A-Za-z_]\w*", name):
            raise GenattError("--env takes the name of a variable alone: its value comes from this environment")
        if name not in os.environ:
            raise GenattError(f"--env {name}: no such variable in this environment: export it first")
        environment[name] = os.environ[name]
    return Job(kind, run, resolved, environment, num_cpus)


def submit(client: api.Client, job: Job, package: packaging.Package, tell: Callable[[str], None]) -> Submitted:
    """Submit the job, unless one for its run is at work already. tell: takes lines about what is done.

    Raises GenattError: another kind of job, or another configuration, is at work on the run; too large a package; what
    Ray refuses.
    """
    before = _of_run(client, job)
    if (working := _working(before, job)) is not None:
        return Submitted(str(working.submission_id), attached=True)
    package.check()
    job_id = f"{job.name}-{1 + max((_attempt(one, job) for one in before), default=0)}"
    tell(f"{job_id}: {len(package.files):,} files, {packaging.megabytes(package.bytes)} before compression")
    with package.staged({DOCUMENT: job.document}) as directory:
        try:
            with api.asking(f"submit job {job_id}"):
                client.submit_job(
                    entrypoint=f"exec python -m jobs.{job.kind}",
                    submission_id=job_id,
                    runtime_env={"working_dir": str(directory), "env_vars": _environment(job)},
                    metadata=job.metadata,
                    entrypoint_num_cpus=job.num_cpus or None,
                )
        except GenattError:
            # Somebody else's submission may have come first: then there is a job of this id.
            now = api.jobs(client)
            if any(one.submission_id == job_id for one in now):
                _working([one for one in now if one.submission_id == job_id], job)  # of this configuration, or raises
                return Submitted(job_id, attached=True)
            raise
    _give_way(client, job, job_id)
    return Submitted(job_id, attached=False)


def resubmission(words: Sequence[str]) -> str:
    """The command that was typed, to be typed again."""
    return f"genatt {shlex.join(map(redact, words))}"


def _of_run(client: api.Client, job: Job) -> list[JobDetails]:
    """The jobs of any kind for its run."""
    return [one for one in api.jobs(client) if f"-{_hash(job.run)}-" in str(one.submission_id)]


def _give_way(client: api.Client, job: Job, job_id: str) -> None:
    """Take the job back where another kind of job for its run came first, by the head's clock: neither saw the other
    before. Raises GenattError then.
    """
    began = {str(one.submission_id): (one.start_time or 0, one) for one in _of_run(client, job)}
    mine = began.get(job_id, (0, None))[0], job_id
    earlier = [one for name, (since, one) in began.items() if (since, name) < mine]
    try:
        _working(earlier, job)
    except GenattError:
        api.stop(client, job_id, None)
        raise


def _working(before: Sequence[JobDetails], job: Job) -> JobDetails | None:
    """The job that is at work for the same run and configuration."""
    for one in before:
        if one.status.is_terminal():
            continue
        known, stopping = one.metadata or {}, f"`genatt jobs stop {one.submission_id} --wait`"
        if known.get("job") != job.kind:
            raise GenattError(
                f"run {redact(job.run)} has job {one.submission_id} at work: wait for its end, or stop it by {stopping}"
            )
        if known.get("config") != job.metadata["config"]:
            raise GenattError(
                f"run {redact(job.run)} has job {one.submission_id} at work with another configuration: wait for its "
                f"end, or stop it by {stopping}"
            )
        return one
    return None


def _environment(job: Job) -> dict[str, str]:
    """A job that is stopped gets the time that its training needs for a checkpoint."""
    training = job.config.get("train", job.config).get("training", {}) if job.kind in ("train", "pipeline") else {}
    wait = int(training.get("stop_seconds", 0)) + _STOP_MARGIN_SECONDS
    return {_STOP_VARIABLE: str(wait)} | job.environment


def _attempt(one: JobDetails, job: Job) -> int:
    """Which attempt at this job another one is; 0 for jobs of another kind."""
    found = re.fullmatch(rf"{re.escape(job.name)}-(\d+)", str(one.submission_id))
    return int(found[1]) if found else 0


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]
