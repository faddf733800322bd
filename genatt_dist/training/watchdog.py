"""No rank waits for ever for another: who is lost or hangs is named, where, and the living ranks end with code 75.

The main thread marks what it does by an assignment (`Mark`); how long it has been there, others find by looking. Beside
it run daemon threads that it never waits for:
- *talk* tells this rank's sign of life to rank 0, and reads what rank 0 says (sign_exchange.py);
- *judge* looks at what was heard. Rank 0 judges all ranks and publishes its verdict; the others judge rank 0. It also
  ends a run whose checkpoint is not written within `training.stop_seconds` of a request to stop;
- *beat* (rank 0) renews RUN/heartbeat.json; a disk that hangs stops nothing else.

A rank whose end is announced is not lost. One that met a collective that failed waits in `failed`, for a verdict or an
announcement to say why, which then takes seconds instead of `training.silence_seconds`.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path

import torch.distributed as dist

from data_pipeline.errors import GenattError, ResumableError
from genatt_dist.training import heartbeat, preemption
from genatt_dist.training.checkpoint.store import Store
from genatt_dist.training.mark import Mark
from genatt_dist.training.sign_exchange import SignExchange
from genatt_dist.training.signs import Limits, Sign, hanging, is_lost_peer, lost
from genatt_dist.training.stopped import advice, write_stopped
from genatt_dist.training.stopping import newest_checkpoint

_TICK_SECONDS = 0.2
_BEAT_SECONDS = 2.0


class Watchdog:
    """Watches over the ranks of one run, from `start` to `close`."""

    def __init__(
        self, mark: Mark, run: Path, store: Store, limits: Limits, stop_seconds: float, rank: int, world_size: int
    ) -> None:
        """store: of the run's checkpoints, to say from which one to go on."""
        self._mark, self._run, self._checkpoints = mark, run, store
        self._limits, self._stop_seconds = limits, stop_seconds
        self._rank, self._world_size = rank, world_size
        self._host = socket.gethostname()
        self._place, self._since = mark.now, time.monotonic()
        self._ended: str | None = None
        self._broken = False
        self._closed = threading.Event()
        self._exchange = SignExchange(rank, world_size, limits.silence, self._sign)
        self._interval = self._exchange.interval

    def start(self, group: dist.ProcessGroup | None) -> None:
        """Begin. Collective over `group`, which is for the CPU; None for one rank. Raises GenattError when rank 0's
        store cannot be reached.
        """
        if group is not None:
            self._exchange.join(group)
            self._thread(self._exchange.talk)
        self._thread(self._judge)
        if self._rank == 0:
            self._thread(self._beat)

    def failed(self, error: BaseException) -> GenattError:
        """What to end with when a collective failed with `error`: it waits for the judge, who ends this process when a
        rank is lost, or for a rank that announced its end. Blocks for a few seconds, or while a host does not answer.
        """
        step, self._broken = self._mark.step, True
        self._exchange.hurry()
        deadline = time.monotonic() + self._limits.silence + 4 * self._interval
        while time.monotonic() < deadline:
            if others := {rank: text for rank, text in self._exchange.endings.items() if rank != self._rank}:
                rank, text = next(iter(others.items()))
                return _EndedError(f"rank {rank} ended ({text}) in step {step} or before")
            time.sleep(_TICK_SECONDS / 2)
        where = self._sign().where
        reason = f"a collective failed on rank {self._rank} {where}: {' '.join(str(error).split())[:200]}"
        checkpoint = newest_checkpoint(self._checkpoints)
        write_stopped(self._run, reason, self._mark.done, self._mark.epoch, checkpoint, self._rank)
        return ResumableError(f"{reason}; {advice(checkpoint)}")

    def close(self, ended: str) -> None:
        """Announce this rank's end, and judge no more. ended: how, in a few words."""
        self._ended = ended
        self._exchange.close()
        self._closed.set()

    def _thread(self, work: object) -> None:
        name = f"watch: {getattr(work, '__name__', '').strip('_')}"
        threading.Thread(target=work, name=name, daemon=True).start()  # type: ignore[arg-type]

    def _sign(self) -> Sign:
        """This rank's; the exchange counts it."""
        operation, step, epoch, _ = self._place
        seconds, pid = round(time.monotonic() - self._since, 1), os.getpid()
        return Sign(self._rank, self._host, pid, 0, step, epoch, operation, seconds, self._ended, self._broken)

    def _judge(self) -> None:
        looked, ended_since = time.monotonic(), None
        while not self._closed.wait(_TICK_SECONDS):
            now = time.monotonic()
            if self._mark.now != self._place:
                self._place, self._since = self._mark.now, now
            if now - looked > max(1.0, self._interval):  # this process was stopped itself, and heard nobody meanwhile
                self._exchange.postpone(now - looked)
                self._since = min(now, self._since + now - looked)  # nor did it work: schedulers suspend jobs for hours
            looked = now
            if self._ended is not None:
                continue
            request = preemption.requested()
            if request is not None and now - request.asked > self._stop_seconds:
                self._give_up(
                    f"{request.reason}: no checkpoint was written within training.stop_seconds="
                    f"{self._stop_seconds:g}, this rank is {self._sign().where}"
                )
            if message := self._exchange.verdict or self._found(now):
                self._give_up(message)
            failed = [rank for rank, text in self._exchange.endings.items() if text.startswith("error")]
            if failed:
                ended_since = ended_since or now
                if now - ended_since > self._limits.silence:  # and the main thread still waits for it
                    self._leave(f"rank {min(failed)} ended; it says why", code=1)

    def _found(self, now: float) -> str | None:
        """What is wrong among the ranks that this one judges."""
        heard, endings, failing = self._exchange.heard, self._exchange.endings, self._exchange.failing
        signs = [self._sign() if rank == self._rank else heard[rank][0] for rank in sorted(heard)]
        signs = [replace(sign, ended=endings.get(sign.rank, sign.ended)) for sign in signs]
        silent = {rank: 0.0 if rank == self._rank else now - when for rank, (_, when) in heard.items()}
        broken = failing or any(sign.broken for sign in signs)
        limit = min(self._limits.silence, 3 * self._interval) if broken else self._limits.silence
        found = lost(signs, silent, limit)
        if self._rank == 0:
            return found or hanging(signs, self._limits)
        if found and silent[0] > limit and failing:
            host, port = self._exchange.address
            return f"host {host} of rank 0 does not answer on port {port}: {found}"
        return found

    def _give_up(self, message: str) -> None:
        """Say it, leave it in the run directory, and end this process."""
        if self._rank != 0 and message == self._exchange.verdict:  # rank 0 has written it
            self._leave(message)
        checkpoint = newest_checkpoint(self._checkpoints)
        write_stopped(self._run, message, self._mark.done, self._mark.epoch, checkpoint, self._rank)
        message = f"{message}; {advice(checkpoint)}"
        if self._rank == 0 and self._world_size > 1:
            self._exchange.publish(message)
            time.sleep(self._interval + 2 * _TICK_SECONDS)  # every rank that lives reads it meanwhile
        self._leave(message)

    def _leave(self, message: str, code: int = ResumableError.exit_code) -> None:
        """End at once: the main thread may be in a collective for minutes yet."""
        with suppress(Exception):
            print(f"error (rank {self._rank}): {message}", file=sys.stderr, flush=True)
            sys.stdout.flush()
        os._exit(code)

    def _beat(self) -> None:
        while not self._closed.is_set():
            now = time.monotonic()
            mine = self._sign()
            ranks = []
            for rank, (sign, when) in sorted(self._exchange.heard.items()):
                shown = mine if rank == self._rank else sign
                facts = {key: value for key, value in asdict(shown).items() if key not in ("count", "broken")}
                ranks.append(facts | {"silent": 0.0 if rank == self._rank else round(now - when, 1)})
            beat = {"step": mine.step, "epoch": mine.epoch, "operation": mine.operation, "ranks": ranks}
            with suppress(OSError):  # told by its age
                heartbeat.write(self._run, beat)
            self._closed.wait(_BEAT_SECONDS)


@contextmanager
def watched(watchdog: Watchdog, group: dist.ProcessGroup | None) -> Iterator[None]:
    """Inside, the watchdog is at work; how it was left is announced to the other ranks.

    A collective that failed because a rank is gone becomes a GenattError (or the process ends) in `Watchdog.failed`.
    """
    watchdog.start(group)
    ended = "error: it was ended"
    try:
        yield
        ended = "finished"
    except ResumableError:
        ended = "stopped"
        raise
    except RuntimeError as error:
        if group is None or not is_lost_peer(error):
            ended = _shown(error)
            raise
        failure = watchdog.failed(error)
        ended = _shown(failure)
        raise failure from error
    except Exception as error:
        ended = _shown(error)
        raise
    finally:
        watchdog.close(ended)


def _shown(error: BaseException) -> str:
    return f"error: {type(error).__name__}: {' '.join(str(error).split())[:200]}"


class _EndedError(GenattError):
    """Another rank ended, and says why; code 1, so that what it says is the run's."""

    exit_code = 1
