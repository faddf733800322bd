"""An iterator that runs in a thread of its own, a few items ahead of who reads it."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterator
from contextlib import suppress
from typing import TypeVar, cast

from data_pipeline.errors import GenattError

T = TypeVar("T")

BATCHES_AHEAD = 4  # batches of training, or of an evaluation, put together before they are asked for
LIMIT_SECONDS = 900.0  # beyond all retries and time limits of a read: something hangs that has none
_LOOK_SECONDS = 0.2  # how soon a thread that waits for room sees that nobody reads any more


def ahead(items: Iterator[T], depth: int, what: str) -> Generator[T, None, None]:
    """The same items, made in the background, at most `depth` of them before they are asked for.

    An error of `items` is raised here, in the thread that reads, in its place among the items. The background thread
    ends when this generator is closed or dropped, and closes `items` itself. `what` names an item in the error that
    comes instead of a wait without end.
    """
    ready: queue.Queue[tuple[bool, T | BaseException | None]] = queue.Queue(depth)
    stop = threading.Event()

    def put(entry: tuple[bool, T | BaseException | None]) -> bool:
        while not stop.is_set():
            try:
                ready.put(entry, timeout=_LOOK_SECONDS)
                return True
            except queue.Full:
                pass
        return False

    def work() -> None:
        try:
            for item in items:
                if not put((True, item)):
                    break
            else:
                put((False, None))
        except BaseException as error:  # whatever it is, the reader has to know
            put((False, error))
        finally:
            if isinstance(items, Generator):
                items.close()

    thread = threading.Thread(target=work, name=f"ahead: {what}", daemon=True)
    thread.start()
    try:
        while True:
            try:
                more, item = ready.get(timeout=LIMIT_SECONDS)
            except queue.Empty:
                raise GenattError(
                    f"no {what} came in {LIMIT_SECONDS:.0f} s: see whether the storage of data.path answers"
                ) from None
            if not more:
                if isinstance(item, BaseException):
                    raise item
                return
            yield cast(T, item)
    finally:
        stop.set()
        with suppress(queue.Empty):  # so that a thread that waits for room goes on, and ends
            while True:
                ready.get_nowait()
        thread.join(timeout=2 * _LOOK_SECONDS)
