"""Measuring in a process of its own: both ends of the pipe, the clock, and the peak of memory.

Children are forked from a server that has imported torch once and inherited the environment of a training worker
(threads, allocator); so a child costs a fraction of a second, and what it allocated dies with it.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import multiprocessing
import os
import resource
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil

from benchmarks.steps.grid import Variant
from genatt_dist.launch.launchers import worker_environment
from genatt_dist.launch.limits import available_memory

MIB = 1 << 20
_PROBE = 16  # A step on this fraction of the batch says beforehand what the whole one will take.
_MEMORY_SHARE = 0.8  # of what is free
_NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory")


class NoMemoryError(Exception):
    """There was not enough memory; the text says of what."""


class TimeLimitError(Exception):
    """A child did not answer in time."""


@dataclass(frozen=True)
class Limits:
    """memory: bytes a variant may take beside its model; None: most of what is free. seconds: what a step may take."""

    memory: int | None
    seconds: float


@dataclass(frozen=True)
class Alone:
    """What a variant took in a process of its own. status: ok, out_of_memory or time_limit; what was not measured is
    None, and `note` says why. seconds: of one step.
    """

    status: str
    seconds: float | None = None
    peak_bytes: int | None = None
    note: str | None = None


class Child:
    """The parent's end of one measuring process. A context: leaving it ends the process."""

    def __init__(self, num_items: int) -> None:
        context = multiprocessing.get_context("forkserver")
        # The first optimizer of a process imports torch._dynamo: seconds that no child should spend again.
        context.set_forkserver_preload(["torch._dynamo", "benchmarks.steps.work"])
        self._pipe, end = context.Pipe()
        self._process = context.Process(target=_answer, args=(end, num_items), daemon=True)
        self._process.start()
        self.pid = self._process.pid
        end.close()

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self._pipe.close()
        self._process.kill()
        self._process.join()

    def ask(self, method: str, *arguments: Any, seconds: float | None = None) -> Any:
        """The answer of the child's `method`. Raises NoMemoryError (also when it was killed) or TimeLimitError."""
        try:
            self._pipe.send((method, arguments))
            if not self._pipe.poll(seconds):
                raise TimeLimitError
            failed, answer = self._pipe.recv()
        except (EOFError, ConnectionError):
            self._process.join()
            if self._process.exitcode == -signal.SIGKILL:
                raise NoMemoryError("the system killed the process") from None
            raise RuntimeError(
                f"a measuring process ended with exit code {self._process.exitcode}; its messages are above"
            ) from None
        if failed:
            raise NoMemoryError(answer)
        return answer


@contextlib.contextmanager
def environment() -> Iterator[None]:
    """Children started inside have the environment of a training worker (what the user has set stays)."""
    before = dict(os.environ)
    os.environ.update(worker_environment(os.environ, 1))
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _answer(pipe: Connection, num_items: int) -> None:
    """The child's life: one answer for each question until the pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer; it ends its children
    measuring = _Measuring(num_items)
    while True:
        try:
            method, arguments = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((False, getattr(measuring, method)(*arguments)))
        except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError
            if isinstance(error, RuntimeError) and not any(sign in str(error) for sign in _NO_MEMORY):
                raise
            pipe.send((True, str(error).splitlines()[0] if str(error) else "memory is used up"))


class _Measuring:
    """What a child can be asked. Everything heavy is imported here, in the child."""

    def __init__(self, num_items: int) -> None:
        import torch

        from genatt_dist.training.engine import select_device

        self._torch, self._device, self._num_items = torch, select_device(), num_items
        torch.backends.cudnn.allow_tf32 = False  # as in training: fp32 means fp32
        self._ready: list[tuple[Any, list[Any]]] = []

    def machine(self) -> dict[str, Any]:
        """Device and threads of this child, as rows name them."""
        cuda = self._device.type == "cuda"
        device = self._torch.cuda.get_device_name(self._device) if cuda else "cpu"
        return {"device": device, "threads": self._torch.get_num_threads()}

    def alone(self, variant: Variant, limits: Limits) -> Alone:
        """Peak memory and time of the variant's first whole step; a step on a part of the batch says beforehand
        whether it would pass the limits.
        """
        from benchmarks.steps.work import work

        subject = work(variant, self._device, self._num_items)
        memory = _Memory(self._torch, self._device)
        allowed = limits.memory or memory.free()
        memory.limit(allowed)
        part = max(1, variant.batch // _PROBE)
        inputs = subject.inputs(part)
        self._seconds(subject, inputs, 0)  # starts threads and makes the optimizer's moments
        settled = memory.settle()
        seconds = self._seconds(subject, inputs, 1) * variant.batch / part
        needed = (memory.peak() - settled) * variant.batch // part
        if needed > allowed:
            note = f"would take about {needed // MIB:,} MiB of the {allowed // MIB:,} MiB it may take"
            return Alone("out_of_memory", note=note)
        if seconds > limits.seconds:
            return Alone("time_limit", note=f"would take about {seconds:.0f} s a step")
        seconds = self._seconds(subject, subject.inputs(variant.batch), 2)
        return Alone("ok", seconds, memory.peak() - memory.baseline)

    def prepare(self, variants: list[Variant]) -> None:
        """Build models and batches of all variants, to be timed in turns."""
        from benchmarks.steps.work import work

        subjects = [work(variant, self._device, self._num_items) for variant in variants]
        shared: dict[tuple[Any, ...], list[Any]] = {}
        for variant, subject in zip(variants, subjects, strict=True):
            if variant.cell not in shared:
                shared[variant.cell] = subject.inputs(variant.batch)
            self._ready.append((subject, shared[variant.cell]))

    def time(self, index: int, draw: int, passes: int) -> float:
        """Seconds of one step of a prepared variant: the mean of some passes over its inputs."""
        subject, inputs = self._ready[index]
        return sum(self._seconds(subject, inputs, draw * passes + number) for number in range(passes)) / passes

    def _seconds(self, subject: Any, inputs: list[Any], draw: int) -> float:
        """Mean seconds of one step on the inputs: by events on a GPU, else by the clock."""
        cuda = self._torch.cuda
        if self._device.type == "cuda":
            start, end = cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)
            start.record()
            for given in inputs:
                subject.run(given, draw)
            end.record()
            end.synchronize()
            return float(start.elapsed_time(end)) / 1e3 / len(inputs)
        begun = time.perf_counter()
        for given in inputs:
            subject.run(given, draw)
        return (time.perf_counter() - begun) / len(inputs)


class _Memory:
    """Bytes in use and their peak: the allocator's own count on a GPU, else the process's resident pages."""

    def __init__(self, torch: Any, device: Any) -> None:
        self._cuda = torch.cuda if device.type == "cuda" else None
        self.baseline = self.settle()

    def settle(self) -> int:
        """Bytes in use now; the peak counts from here. Free pages the allocator kept go back to the system first, or
        they would hide what comes next.
        """
        gc.collect()
        if self._cuda:
            self._cuda.synchronize()
            self._cuda.reset_peak_memory_stats()
            return int(self._cuda.memory_allocated())
        if sys.platform == "linux":
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets the peak to what is resident now
        return _resident()

    def peak(self) -> int:
        if self._cuda:
            return int(self._cuda.max_memory_allocated())
        # Kilobytes on Linux, bytes on macOS, where the peak cannot be reset and small ones are lost in the first.
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1024 if sys.platform == "linux" else 1)

    def free(self) -> int:
        """Bytes this process may safely ask for."""
        if self._cuda:
            return int(self._cuda.mem_get_info()[0] * _MEMORY_SHARE)
        return int(min(psutil.virtual_memory().available, available_memory()) * _MEMORY_SHARE)

    def limit(self, extra: int) -> None:
        """Refuse this process more than `extra` bytes from now on: an error that can be told, not a kill. On a GPU the
        allocator refuses by itself.
        """
        if not self._cuda and sys.platform == "linux":
            status = Path("/proc/self/status").read_text()
            data = 1024 * int(status.partition("VmData:")[2].split()[0])
            resource.setrlimit(resource.RLIMIT_DATA, (data + extra, resource.RLIM_INFINITY))


def _resident() -> int:
    return int(psutil.Process().memory_info().rss)
