"""Signs of life told and heard, through a TCPStore that rank 0 serves on a free port of MASTER_ADDR.

Each rank writes its own sign; rank 0 reads them all and says who has ended and what its verdict is, which the others
read. So a sign costs every rank one write and one read, however many ranks there are. It may get stuck when a host is
cut off, so nothing is decided here (watchdog.py).
"""

from __future__ import annotations

import datetime
import json
import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, replace

import torch.distributed as dist

from data_pipeline.errors import GenattError
from genatt_dist.training.signs import Sign

_LONGEST_INTERVAL = 2.0
_HURRY_SECONDS = 0.05
_LINGER_SECONDS = 2 * _LONGEST_INTERVAL  # rank 0 serves so long after its own end, for others to read it
_ROOT = "0"


class SignExchange:
    """What one rank says and hears. Its attributes and methods are for any thread; `talk` runs in one of its own.

    interval: seconds between two signs. address: host and port of rank 0's store. failing: why the last talk failed, or
    "". verdict: of rank 0, once it has one.
    """

    def __init__(self, rank: int, world_size: int, silence: float, sign: Callable[[], Sign]) -> None:
        """silence: seconds after which a rank counts as lost. sign: this rank's, whatever its count."""
        self._rank, self._world_size, self._sign = rank, world_size, sign
        self.interval = min(_LONGEST_INTERVAL, silence / 6)
        self.address = (os.environ.get("MASTER_ADDR", "127.0.0.1"), 0)
        self.failing = ""
        self.verdict: str | None = None
        self._count = 0
        self._heard: dict[int, tuple[Sign, float]] = {rank: (sign(), time.monotonic())}
        self._endings: dict[int, str] = {}
        self._wake, self._said, self._closed = threading.Event(), threading.Event(), threading.Event()
        self._store: dist.TCPStore | None = None

    @property
    def heard(self) -> dict[int, tuple[Sign, float]]:
        """The newest sign of every rank that this one judges, and when it came."""
        return dict(self._heard)

    @property
    def endings(self) -> dict[int, str]:
        """How ranks ended, of those that have."""
        return dict(self._endings)

    def join(self, group: dist.ProcessGroup) -> None:
        """Open the store and hear every rank once. Collective. Raises GenattError when it cannot be reached."""
        told: list[object] = [None]
        if self._rank == 0:
            self._store = dist.TCPStore("localhost", 0, None, True, wait_for_workers=False)
            told = [self._store.port]
        dist.broadcast_object_list(told, 0, group=group)
        self.address = (self.address[0], int(str(told[0])))
        if self._rank != 0:
            self._connect()
        assert self._store is not None
        self._store.set_timeout(datetime.timedelta(seconds=max(2.0, self.interval)))
        if self._rank == 0:
            self._tell(self._sign())
        else:
            self._store.set(str(self._rank), self._sign().text())
        told = [None] * self._world_size
        dist.all_gather_object(told, self._sign().text(), group=group)  # now every key is there
        now = time.monotonic()
        judged = range(self._world_size) if self._rank == 0 else (0, self._rank)
        self._heard = {rank: (Sign.of(str(told[rank])), now) for rank in judged}

    def talk(self) -> None:
        """Tell and hear until `close`: every interval, and without a pause once this rank has ended or is broken."""
        while not self._closed.is_set():
            try:
                if self.failing and self._rank != 0:
                    self._connect()
                self._exchange()
                self.failing = ""
            except Exception as error:  # whatever it is: the judge decides by what was heard
                self.failing = " ".join(str(error).split())[:200] or type(error).__name__
            mine = self._sign()
            hurry = mine.broken or mine.ended is not None
            self._wake.wait(_HURRY_SECONDS if hurry else self.interval)
            self._wake.clear() if not hurry else time.sleep(_HURRY_SECONDS)

    def hurry(self) -> None:
        """This rank's sign has changed: tell it now."""
        self._wake.set()

    def publish(self, verdict: str) -> None:
        """Of rank 0: what the others end with."""
        self.verdict = verdict
        self._wake.set()

    def postpone(self, seconds: float) -> None:
        """This process was stopped for so long itself, and heard nobody meanwhile: everybody was heard later."""
        self._heard = {rank: (sign, when + seconds) for rank, (sign, when) in self._heard.items()}

    def close(self) -> None:
        """Say the sign of this rank's end, and end. Rank 0 waits some seconds until the others have told theirs."""
        if self._world_size > 1:
            self._said.clear()
            self._wake.set()
            self._said.wait(_LINGER_SECONDS)
            deadline = time.monotonic() + _LINGER_SECONDS
            while self._rank == 0 and time.monotonic() < deadline and not self.failing:
                if len({*self._endings, 0}) == self._world_size:
                    break
                time.sleep(_HURRY_SECONDS)
        self._closed.set()
        self._wake.set()

    def _connect(self) -> None:
        """A new connection to rank 0's store. Raises GenattError or RuntimeError."""
        try:
            socket.create_connection(self.address, timeout=max(2.0, self.interval)).close()
        except OSError as error:
            raise GenattError(
                f"rank {self._rank} cannot reach {self.address[0]}:{self.address[1]} of rank 0 ({error}): let the "
                "hosts of a run reach each other on all TCP ports, and MASTER_ADDR be the host of rank 0"
            ) from None
        timeout = datetime.timedelta(seconds=max(2.0, self.interval))
        self._store = dist.TCPStore(*self.address, None, False, timeout, wait_for_workers=False)

    def _exchange(self) -> None:
        assert self._store is not None
        self._count += 1
        mine = replace(self._sign(), count=self._count)
        if self._rank != 0:
            self._store.set(str(self._rank), mine.text())
            told = json.loads(self._store.get(_ROOT))
            self._hear(Sign(**told["sign"]))
            self._endings |= {int(rank): text for rank, text in told["endings"].items()}
            self.verdict = self.verdict or told["verdict"]
        else:
            others = [str(rank) for rank in range(1, self._world_size)]
            for text in self._store.multi_get(others):
                self._hear(Sign.of(text))
            endings = {sign.rank: sign.ended for sign, _ in list(self._heard.values()) if sign.ended is not None}
            self._endings |= endings
            self._tell(mine)
        self._heard[self._rank] = (mine, time.monotonic())
        if mine.ended is not None:
            self._endings[self._rank] = mine.ended
            self._said.set()

    def _tell(self, mine: Sign) -> None:
        """What rank 0 says: its own sign, who has ended, and its verdict."""
        assert self._store is not None
        told = {"sign": asdict(mine), "endings": self._endings, "verdict": self.verdict}
        self._store.set(_ROOT, json.dumps(told))

    def _hear(self, sign: Sign) -> None:
        before, when = self._heard[sign.rank]
        self._heard[sign.rank] = (sign, when if sign.count == before.count else time.monotonic())
