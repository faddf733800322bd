"""Processes that were started together: waited for, asked to stop, and ended for certain."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import IO

import psutil

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_LOOK_SECONDS = 0.1
_KILLED_SECONDS = 5.0  # until the kernel has ended what got SIGKILL
STOP, NOW = signal.SIGTERM, signal.SIGKILL  # what `asked` says: end in order, end at once


class Group:
    """A program in a process group of its own. Where this process is killed outright, the kernel sends it SIGTERM."""

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        stdin: IO[bytes] | int | None = None,
        stderr: int | None = None,
    ) -> None:
        self.process = subprocess.Popen(
            command,
            env=dict(environment),
            stdin=stdin,
            stderr=stderr,
            start_new_session=True,
            preexec_fn=_ends_with_parent(),
        )
        self._over = False
        self._apart: list[psutil.Process] = []  # descendants in sessions of their own, as torchrun's

    def wait(self, asked: Callable[[], int], stop_seconds: float) -> int:
        """The program's exit code, once nothing of the group is left.

        Once `asked()` is a signal, STOP or another, and not 0, all get it, and SIGKILL after `stop_seconds` (or when it
        is NOW). What the program leaves behind has as long.
        """
        deadline: float | None = None
        while (running := self.process.poll() is None) or self._members():
            number = asked()
            if number == NOW or (deadline is not None and time.monotonic() > deadline):
                break
            if deadline is None and number:
                self._signal(number)
            if deadline is None and (number or not running):
                deadline = time.monotonic() + stop_seconds
            time.sleep(_LOOK_SECONDS)
        self.kill()
        return self.process.wait()

    def kill(self) -> None:
        """End all of it at once; only once, for its number may be another group's by then."""
        if self._over:
            return
        self._note_descendants()
        self._signal(signal.SIGKILL)
        for process in self._apart:
            with suppress(psutil.Error):
                process.kill()
        self.process.wait()
        deadline = time.monotonic() + _KILLED_SECONDS
        while self._members() and time.monotonic() < deadline:
            time.sleep(_LOOK_SECONDS)
        self._over = True

    def _signal(self, number: int) -> None:
        self._note_descendants()
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def _note_descendants(self) -> None:
        """While their parents live: nothing tells of whom an orphan was a child."""
        if self.process.poll() is None:
            with suppress(psutil.Error):
                self._apart = psutil.Process(self.process.pid).children(recursive=True)

    def _members(self) -> bool:
        """Whether a process of the group lives; one that ended and that nobody has waited for does not."""
        try:
            os.killpg(self.process.pid, 0)
        except ProcessLookupError:
            return False
        for process in psutil.process_iter():
            with suppress(psutil.Error, ProcessLookupError):
                if os.getpgid(process.pid) == self.process.pid and process.status() != psutil.STATUS_ZOMBIE:
                    return True
        return False


def _ends_with_parent() -> Callable[[], None] | None:
    """For a child to call before it becomes its program: it gets SIGTERM when this process is gone, however it went.

    SIGTERM and not SIGKILL, so that torchrun and deepspeed end their ranks too. None where the kernel is not Linux.
    """
    if sys.platform != "linux":
        return None
    libc, parent = ctypes.CDLL(None), os.getpid()  # loaded here: a forked child should do as little as possible

    def ask() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        if os.getppid() != parent:  # gone before the kernel was asked
            os._exit(1)

    return ask
