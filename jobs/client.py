"""A cluster's Jobs API: every request has a time limit, and what fails is one line.

A job is followed over the websocket of the Jobs API, and its status is asked for beside it: a websocket says nothing of
a head node that is gone.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from data_pipeline.errors import GenattError, ResumableError
from data_pipeline.redaction import one_line, redact

ADDRESS_VARIABLE = "RAY_API_SERVER_ADDRESS"  # Ray's own
DEFAULT_ADDRESS = "http://127.0.0.1:8265"
CONNECT_SECONDS, ANSWER_SECONDS = 5.0, 60.0
FIRST_ANSWER_SECONDS = 8.0  # with CONNECT_SECONDS: a wrong address is told within 15 s
LOST_SECONDS = 90.0  # without an answer, after which a cluster is given up that was there
POLL_SECONDS = 1.0
_REST_SECONDS = 5.0  # for the last lines of a job that has ended
# What `ray` and `requests` raise for a request that fails.
_FAILURES = (requests.RequestException, RuntimeError, OSError, AuthenticationError)


for _name in ("dashboard.modules.dashboard_sdk", "dashboard.modules.job.sdk", "_private.runtime_env.packaging"):
    logging.getLogger(f"ray.{_name}").setLevel(logging.WARNING)  # what they tell of every upload is told here


class JobFailedError(GenattError):
    """A job ended with an error of its own; its messages are in its log."""

    exit_code = 1


class Client(JobSubmissionClient):
    """`JobSubmissionClient` whose requests end."""

    answer_seconds = FIRST_ANSWER_SECONDS

    def _do_request(self, method: str, endpoint: str, **options: Any) -> requests.Response:
        options.setdefault("timeout", (CONNECT_SECONDS, self.answer_seconds))
        return super()._do_request(method, endpoint, **options)


def connect(address: str | None) -> Client:
    """The Jobs API at `address` (default: RAY_API_SERVER_ADDRESS, else this machine's). Raises GenattError within 15 s
    where nothing answers.
    """
    address = (address or os.environ.get(ADDRESS_VARIABLE) or DEFAULT_ADDRESS).rstrip("/")
    shown = redact(address)
    if not address.startswith(("http://", "https://")):
        raise GenattError(f"--address {shown} is no HTTP address: give the dashboard's, as {DEFAULT_ADDRESS}")
    try:
        with _without("RAY_ADDRESS", ADDRESS_VARIABLE):  # Ray prefers them to an address that was typed
            client = Client(address)
    except AuthenticationError:
        raise GenattError(
            f"the Ray cluster at --address {shown} asks for a token, or refuses this one: set RAY_AUTH_MODE=token and "
            "RAY_AUTH_TOKEN (or RAY_AUTH_TOKEN_PATH) to the cluster's"
        ) from None
    except _FAILURES as error:
        said = one_line(error, address)
        why = "" if said.startswith("Failed to connect") else f": {said}"  # which only has the address once more
        raise GenattError(
            f"no Ray cluster answers at --address {shown}{why}: see that its head node runs with a dashboard (`ray "
            "start --head`), and forward its port where it is not reachable"
        ) from None
    client.answer_seconds = ANSWER_SECONDS
    return client


def jobs(client: Client) -> list[JobDetails]:
    """All submitted jobs, newest first."""
    with asking("list jobs"):
        found = [job for job in client.list_jobs() if job.submission_id]
    return sorted(found, key=lambda job: job.start_time or 0, reverse=True)


def details(client: Client, job_id: str) -> JobDetails:
    """One job. Raises GenattError where there is none of that id."""
    with asking(f"find job {job_id}"):
        return client.get_job_info(job_id)


def stop(client: Client, job_id: str, wait_seconds: float | None) -> JobDetails:
    """Ask a job to end (SIGTERM: a training writes a checkpoint first), and wait for it so long; None: not at all."""
    details(client, job_id)
    with asking(f"stop job {job_id}"):
        client.stop_job(job_id)
    deadline = time.monotonic() + (wait_seconds or 0)
    while not (found := details(client, job_id)).status.is_terminal() and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
    if wait_seconds is not None and not found.status.is_terminal():
        raise GenattError(
            f"job {job_id} is still {found.status.value} {wait_seconds:.0f} s after it was asked to stop: look again "
            "with `genatt jobs list`"
        )
    return found


def follow(
    client: Client,
    job_id: str,
    write: Callable[[str], None],
    tell: Callable[[str], None],
    seconds: float | None = None,
) -> JobDetails | None:
    """Pass on a job's log until it ends. None where it has not ended after so many seconds.

    write: takes pieces of the log; tell: takes the status, whenever it was asked for.
    Raises ResumableError where the cluster does not answer for `LOST_SECONDS`.
    """
    return asyncio.run(_follow(client, job_id, write, tell, seconds))


async def _follow(
    client: Client, job_id: str, write: Callable[[str], None], tell: Callable[[str], None], seconds: float | None
) -> JobDetails | None:
    deadline = None if seconds is None else time.monotonic() + seconds
    written, answered = 0, time.monotonic()
    tail: asyncio.Task[None] | None = None

    async def read() -> None:
        nonlocal written
        seen = 0  # a connection begins at the first line again
        async for text in client.tail_job_logs(job_id):
            seen += len(text)
            if new := text[max(0, len(text) - (seen - written)) :] if seen > written else "":
                write(new)
                written = seen

    try:
        while True:
            if tail is None or tail.done():
                if tail is not None:
                    tail.exception()  # the status says whether it matters
                tail = asyncio.create_task(read())
            try:
                found = await asyncio.to_thread(details, client, job_id)
                answered = time.monotonic()
            except GenattError as error:
                found = None
                if time.monotonic() - answered > LOST_SECONDS:
                    raise ResumableError(
                        f"job {job_id}: its cluster has not answered for {LOST_SECONDS:.0f} s ({error}): submit it "
                        "again when the cluster is back"
                    ) from None
            if found is not None:
                tell(found.status.value)
                if found.status.is_terminal():
                    await asyncio.wait({tail}, timeout=_REST_SECONDS)
                    with suppress(*_FAILURES):
                        log = await asyncio.to_thread(client.get_job_logs, job_id)
                        write(log[written:])
                    return found
            if deadline is not None and time.monotonic() > deadline:
                return None
            await asyncio.sleep(POLL_SECONDS)
    finally:
        if tail is not None:
            tail.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await tail


def check_ended(job: JobDetails, again: str) -> None:
    """Raises what a job's end means for who submitted it; `again` is the command that goes on.

    ResumableError (exit code 75) where it was stopped and can go on, `JobFailedError` (1) where it failed.
    """
    name = job.submission_id
    if job.status is JobStatus.SUCCEEDED:
        return
    supervisor_died = str(getattr(job.error_type, "value", job.error_type)) == "JOB_SUPERVISOR_ACTOR_DIED"
    if job.status is JobStatus.STOPPED or job.driver_exit_code == ResumableError.exit_code or supervisor_died:
        why = "lost its node" if supervisor_died else "was stopped"
        raise ResumableError(f"job {name} {why} and can go on: {again}")
    if job.driver_exit_code is not None:
        raise JobFailedError(f"job {name} failed with exit code {job.driver_exit_code}; its messages are above")
    raise JobFailedError(f"job {name} failed before it ran: {_first_line(job.message)}")


def seconds(job: JobDetails) -> float | None:
    """How long a job has run."""
    if job.start_time is None:
        return None
    end = job.end_time or time.time() * 1000
    return max(0.0, (end - job.start_time) / 1000)


@contextmanager
def asking(what: str) -> Iterator[None]:
    """Whatever a request in the block fails with is one `GenattError`: cannot `what`."""
    try:
        yield
    except _FAILURES as error:
        raise GenattError(f"cannot {what}: {_first_line(one_line(error))}") from None


def _first_line(text: str | None) -> str:
    said = " ".join((text or "Ray does not say why").split())
    return said if len(said) <= 400 else f"{said[:400]}…"


@contextmanager
def _without(*names: str) -> Iterator[None]:
    before = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(before)
