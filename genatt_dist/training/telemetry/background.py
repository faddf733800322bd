"""A writer that may fail, hang or be slow without the run: it writes in a thread of its own, and never raises."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable

from genatt_dist.training.telemetry.writers import Values, Writer
from genatt_dist.training.warnings import FailureSign

_MOST_WAITING = 1000


class Background:
    """Hands what it is given to a writer that is made and used in the background.

    Where the writer fails, or cannot keep up, one line says so and the run goes on without it; the line has the kind of
    error alone, because its text may hold an address with credentials.
    """

    def __init__(self, name: str, make: Callable[[], Writer], tell: Callable[[str], None]) -> None:
        """name: of the writer, for the line that `tell` gets."""
        self._name, self._tell, self._told = name, tell, False
        self._waiting: queue.Queue[Callable[[Writer], object] | None] = queue.Queue(_MOST_WAITING)
        self._thread = threading.Thread(target=self._work, args=(make,), name=f"telemetry: {name}", daemon=True)
        self._thread.start()

    def record(self, kind: str, step: int, values: Values) -> None:
        self._put(lambda writer: writer.record(kind, step, values))

    def warn(self, step: int, sign: FailureSign) -> None:
        self._put(lambda writer: writer.warn(step, sign))

    def close(self, failed: bool) -> None:
        """Ask the writer to end; `join` waits for it."""
        self._put(lambda writer: writer.close(failed))
        self._put(None)

    def join(self, deadline: float) -> None:
        """Wait until all is written, at most until `time.monotonic` gives `deadline`."""
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            self._say("did not take everything in time: it lacks the end of this run")

    def _put(self, call: Callable[[Writer], object] | None) -> None:
        if not self._thread.is_alive():
            return
        try:
            self._waiting.put_nowait(call)
        except queue.Full:
            self._say("is too slow: it lacks some of this run's records")

    def _work(self, make: Callable[[], Writer]) -> None:
        try:
            writer = make()
            while (call := self._waiting.get()) is not None:
                call(writer)
        except BaseException as error:  # whatever a server, a disk or a client library does
            self._say(f"failed ({type(error).__name__}): it gets nothing more of this run")

    def _say(self, what: str) -> None:
        if not self._told:
            self._told = True
            self._tell(f"warning: {self._name} {what}; training goes on, metrics.jsonl has everything")
