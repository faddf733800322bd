"""How processes that were started apart begin one run: torchrun on several hosts, Slurm's tasks.

The first one makes the run directory; the others wait for it. They meet in a TCPStore of the first, so that a mistake
it finds is told by all, and nobody waits longer than a time limit. A file with a token in it shows whether the
directory is the same for all.
"""

from __future__ import annotations

import datetime
import json
import os
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

from data_pipeline.errors import GenattError

START_FILE = ".start"
_SEEN_SECONDS = 60.0  # a network file system may show a new file late
_TOLD_SECONDS = 10.0
_LOOK_SECONDS = 0.1


def mark(run: Path) -> str:
    """Write the token of this start into the run directory, and return it."""
    token = uuid.uuid4().hex
    temporary = run / f"{START_FILE}.{os.getpid()}"
    temporary.write_text(token)
    temporary.rename(run / START_FILE)
    return token


def check_seen(run: Path, token: str, host: str, seconds: float = _SEEN_SECONDS) -> None:
    """Whether this host sees the run directory that the first one marked."""
    deadline = time.monotonic() + seconds
    while True:
        with suppress(OSError):
            os.listdir(run)  # makes NFS look again
            if (run / START_FILE).read_text() == token:
                return
        if time.monotonic() > deadline:
            raise GenattError(
                f"host {host} does not see in run directory {run} what the first host wrote there (waited "
                f"{seconds:.0f} s): put it on a file system that all hosts share, under the same path"
            )
        time.sleep(_LOOK_SECONDS)


class Meeting:
    """One process's part in it. Raises GenattError when the others do not come within `seconds`.

    first: whether this is the one that the others wait for, at `host`:`port`; size: processes in all; number: place of
    this one among them, None: in the order of arrival.
    """

    def __init__(self, host: str, port: int, first: bool, size: int, number: int | None, seconds: float) -> None:
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # read at import: what goes wrong is told in one line
        from torch.distributed import TCPStore

        self._at, self._first, self._size, self._seconds = f"{host}:{port}", first, size, seconds
        self._announced = False
        try:
            limit = datetime.timedelta(seconds=seconds)
            self._store = TCPStore(host, port, None, first, limit, wait_for_workers=False)
            self.number = number if number is not None else 0 if first else self._store.add("next", 1)
            if self._store.add(f"taken/{self.number}", 1) > 1 or self.number >= size:
                raise GenattError(
                    f"place {self.number} of {size} at {self._at} is taken: give each host a --node-rank of its own, "
                    "or none to all of them"
                )
            here = self._store.add("here", 1)
        except RuntimeError as error:
            raise self._failure(error) from None
        deadline = time.monotonic() + seconds
        while first and here < size:
            if time.monotonic() > deadline:
                raise GenattError(
                    f"{here} of {size} came to {self._at} within {seconds:.0f} s: give the same command on every host, "
                    "or allow more by --start-seconds"
                )
            time.sleep(_LOOK_SECONDS)
            here = self._store.add("here", 0)

    def announce(self, run: Path, port: int) -> None:
        """The first one's word that `run` is ready. port: of the first rank."""
        self._say({"token": mark(run), "port": port})

    def hear(self, run: Path, host: str) -> int:
        """Wait for the first one's word, and look whether its `run` is here. Returns the port of the first rank."""
        try:
            word: dict[str, Any] = json.loads(self._store.get("word"))
        except RuntimeError as error:
            raise self._failure(error) from None
        with suppress(RuntimeError):  # it has ended meanwhile
            self._store.add("heard", 1)
        if "error" in word:
            raise GenattError(f"the first host could not start: {word['error']}")
        check_seen(run, word["token"], host)
        return int(word["port"])

    def refuse(self, message: str) -> None:
        """The first one's word that there will be no run; waits a little, so that all hear it."""
        if not self._first or self._announced:
            return
        with suppress(RuntimeError):
            self._say({"error": message})
            deadline = time.monotonic() + _TOLD_SECONDS
            while self._store.add("heard", 0) < self._size - 1 and time.monotonic() < deadline:
                time.sleep(_LOOK_SECONDS)

    def _say(self, word: dict[str, Any]) -> None:
        self._announced = True
        self._store.set("word", json.dumps(word))

    def _failure(self, error: RuntimeError) -> GenattError:
        said = " ".join(str(error).split())
        if "EADDRINUSE" in said or "address already in use" in said.lower():
            return GenattError(f"port of {self._at} is in use here: end what listens there, or choose another port")
        return GenattError(
            f"no word from the first host at {self._at} within {self._seconds:.0f} s ({said[:120]}): is the same "
            "command running there, and is the port open? It checks the data first: --start-seconds allows more"
        )
