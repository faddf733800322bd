"""Requests to stop: a signal or a notice says so at any moment, from any thread; the ranks stop when they next agree.

`request` is one append, so a signal handler, Ray's thread and the main thread may all call it. In a worker of ours
`handle_signals` listens: Python's handlers run only when the main thread is in Python, which may wait in a collective
for minutes, so a thread reads the signals' numbers from a pipe that the C handler writes to.

SIGTERM once or more, or SIGINT once: finish the step, write a checkpoint, end with code 75. A second SIGINT: end at
once. Before training can stop in that way (libraries are loaded, ranks find each other), and when it is over, any of
them ends the process.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

INTERRUPTED = 130  # the shell's code of a process ended by Ctrl-C
_ONE_PRESS_SECONDS = 1.0  # a launcher passes on what the terminal has sent to its workers already


@dataclass(frozen=True)
class Request:
    """Why to stop, and when that was asked (time.monotonic())."""

    reason: str
    asked: float


_requests: deque[Request] = deque(maxlen=64)
_serving: bool | None = None  # None: not yet; False: not any more


def request(reason: str) -> None:
    """Ask this run to stop with a checkpoint. Returns at once; the first reason is the one that is told."""
    if len(_requests) < 64:
        _requests.append(Request(reason, time.monotonic()))


def requested() -> Request | None:
    """The first request to stop, if there is one."""
    return _requests[0] if _requests else None


@contextmanager
def serving() -> Iterator[None]:
    """Inside, requests are answered by a checkpoint; at the end they are forgotten, for what runs here next."""
    global _serving
    _serving = True
    try:
        yield
    finally:
        _serving = False
        _requests.clear()


def handle_signals(unready: Callable[[str], None]) -> None:
    """Turn SIGTERM and SIGINT into requests, from now on. To be called in the main thread.

    unready: called with the reason, in a thread, where nothing serves requests yet; has to end the process.
    """
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _noted)
    signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    threading.Thread(target=_listen, args=(reader, writer, unready), name="signals", daemon=True).start()


def _noted(number: int, frame: object) -> None:
    """What Python calls late; the listening thread knows already."""


def _listen(reader: socket.socket, writer: socket.socket, unready: Callable[[str], None]) -> None:
    """writer: kept open by this frame."""
    interrupted = None
    while True:
        for number in reader.recv(64):
            if number not in (signal.SIGTERM, signal.SIGINT):
                continue
            now = time.monotonic()
            if number == signal.SIGINT:
                if interrupted is not None and now - interrupted > _ONE_PRESS_SECONDS:
                    os._exit(INTERRUPTED)
                interrupted = interrupted or now
            reason = signal.Signals(number).name
            request(reason)
            if _serving is None:
                unready(reason)
            elif not _serving:
                os._exit(128 + number)  # as without these handlers: the run is over, however it went
