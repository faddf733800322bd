"""What driver, controller and ranks of a run under Ray Train say to each other: a small actor beside the driver.

The driver asks the ranks to stop through it, the ranks tell it that they are there and what the user should read, and
the callbacks, which Ray Train calls in its controller, decide with it whether a failure is one to start again after.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayActorError
from ray.train import UserCallback
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError, WorkerHealthCheckTimeoutError
from ray.train.v2._internal.execution.callback import ControllerCallback

from data_pipeline.errors import GenattError, ResumableError

ASK_SECONDS = 60.0  # for an answer of the actor, which only a dead or drowned node leaves out


@dataclass(frozen=True)
class News:
    """What has happened since it was last asked for.

    lines      for the user
    ranks      that are in the training function now
    drained    Ray's reason and the ids of nodes that it takes away, once it said so
    """

    lines: tuple[str, ...]
    ranks: int
    drained: tuple[str, tuple[str, ...]] | None


class Control:
    """The actor. Ranks wait in `stopped` for the length of the run: one call each, and none while training."""

    def __init__(self) -> None:
        self._stop, self._reason = asyncio.Event(), ""
        self._places: dict[int, str] = {}
        self._lines: list[str] = []
        self._drained: tuple[str, tuple[str, ...]] | None = None

    async def stopped(self) -> str:
        """Return the reason as soon as the ranks are to stop."""
        await self._stop.wait()
        return self._reason

    async def stop(self, reason: str) -> None:
        self._reason = self._reason or reason
        self._stop.set()

    async def proceed(self) -> None:
        """Take the wish to stop back: new ranks will train."""
        self._reason = ""
        self._stop = asyncio.Event()

    async def reason(self) -> str:
        """Why the ranks are to stop; empty where they are not."""
        return self._reason

    async def drained(self, reason: str, nodes: tuple[str, ...]) -> None:
        """Ray takes nodes away that ranks are on."""
        self._drained = reason, nodes
        await self.stop(reason)

    async def entered(self, rank: int, place: str) -> None:
        """A rank begins to train; place: its host and process."""
        self._places[rank] = place

    async def left(self, rank: int) -> None:
        self._places.pop(rank, None)

    async def lost(self) -> dict[int, str]:
        """No rank trains any more; where those were that did not leave."""
        places, self._places = self._places, {}
        return places

    async def ranks(self) -> int:
        return len(self._places)

    async def say(self, line: str) -> None:
        self._lines.append(line)

    async def news(self) -> News:
        lines, self._lines = tuple(self._lines), []
        return News(lines, len(self._places), self._drained)


def ask(answer: Any, seconds: float = ASK_SECONDS) -> Any:
    """The value of a call to the actor, in bounded time."""
    return ray.get(answer, timeout=seconds)


class Verdict(UserCallback):
    """Whether Ray Train starts the ranks again after a failure: it does, unless this raises."""

    def __init__(self, control: Any, max_failures: int) -> None:
        self._control, self._max_failures, self._failures = control, max_failures, 0

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Raises GenattError: a mistake, which a new start would meet again, or the stop that was asked for."""
        if mistake := _mistake(worker_exceptions):
            raise mistake
        reason = ask(self._control.reason.remote())
        if reason:
            stopped = [error for error in worker_exceptions.values() if isinstance(error, ResumableError)]
            raise stopped[0] if stopped else ResumableError(reason)
        places = ask(self._control.lost.remote())
        if not places:  # told already
            return
        self._failures += 1
        again = self._max_failures < 0 or self._failures <= self._max_failures
        limit = "" if self._max_failures < 0 else f" of {self._max_failures}"
        if again:
            ask(
                self._control.say.remote(
                    f"{describe(worker_exceptions, places)}: starting again ({self._failures}{limit})"
                )
            )


class SaveFirst(ControllerCallback):
    """Before Ray Train takes ranks away to start with more or fewer of them, they write a checkpoint."""

    def __init__(self, control: Any, seconds: float) -> None:
        self._control, self._seconds = control, seconds

    def before_controller_execute_resize_decision(self, resize_decision: Any) -> None:
        """Also called at the first start and after failures, when no rank trains."""
        if not ask(self._control.ranks.remote()):
            return
        number = resize_decision.num_workers
        ask(self._control.stop.remote(f"the cluster has room for {number} ranks now"))
        deadline = time.monotonic() + self._seconds
        while ask(self._control.ranks.remote()) and time.monotonic() < deadline:
            time.sleep(0.2)
        ask(self._control.lost.remote())
        ask(self._control.proceed.remote())
        ask(self._control.say.remote(f"the cluster has room for {number} ranks now: going on with them"))


def describe(errors: Mapping[int, Exception], places: Mapping[int, str]) -> str:
    """Which ranks were lost, or what else happened, in a line."""
    dead = [rank for rank, error in errors.items() if _is_loss(error)]
    if dead:
        named = ", ".join(f"rank {rank}{f' ({places[rank]})' if rank in places else ''}" for rank in sorted(dead))
        return f"{named} lost"
    rank, error = min(errors.items())
    return f"rank {rank}: {one_line(error)}"


def one_line(error: BaseException) -> str:
    """What an exception says: a mistake's message, else the kind of error and the beginning of its text."""
    said = " ".join(str(error).split())
    return said if isinstance(error, GenattError) else f"{type(error).__name__}: {said}"[:300]


def _mistake(errors: Mapping[int, Exception]) -> GenattError | None:
    for _, error in sorted(errors.items()):
        if isinstance(error, GenattError) and not isinstance(error, ResumableError):
            return error
    return None


def _is_loss(error: BaseException) -> bool:
    """Whether a process is gone."""
    return isinstance(error, RayActorError | WorkerHealthCheckFailedError | WorkerHealthCheckTimeoutError)
