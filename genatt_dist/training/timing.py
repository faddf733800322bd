"""Where the time of a training step goes: named sections, measured without making a device wait.

Sections of an update, in their order: "input" (waiting for a batch), "lookup" (ids go to the ranks that hold their rows
of a sharded table, and rows come back; no such section where all tables are replicated), "forward" (draws, dense model
and loss, the sharded softmax's exchange among them), "backward" (gradients, those of rows sent back and applied by the
fused optimizer, DeepSpeed's reduction), "optimizer" (dense parameters, and the table under the full softmax).

On the CPU a section is two readings of a clock. On a GPU it is a pair of events in the stream, read when the log is
written, so that the host never waits for the device inside a step; "input" is the host's own waiting there too. While a
torch.profiler runs, each section is also a `record_function` range of the same name; otherwise none is made.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Protocol, TypeVar

import torch
from torch.autograd import profiler

T = TypeVar("T")

SECTIONS = ("input", "lookup", "forward", "backward", "optimizer")


class Section(Protocol):
    """A context that adds to its section's time; entered again only after it was left."""

    def __enter__(self) -> None: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class SectionTimer:
    """Seconds of each section since they were last taken.

    current: the section that this process is in (on a GPU: that it gives work for), "" between two; any thread may
    read it.
    """

    def __init__(self, device: torch.device, names: Sequence[str] = SECTIONS) -> None:
        self.current = ""
        on_device = _Streamed if device.type == "cuda" else _Clocked
        self._sections = {name: (_Clocked if name == "input" else on_device)(self, name) for name in names}

    def __getitem__(self, name: str) -> Section:
        return self._sections[name]

    def waiting(self, items: Iterator[T]) -> Iterator[T]:
        """The same items; the time until each one comes is "input"."""
        section, end = self._sections["input"], object()
        while True:
            with section:
                item = next(items, end)
            if item is end:
                return
            yield item  # type: ignore[misc]

    def take(self) -> dict[str, float]:
        """Seconds by section since the last call. On a GPU the host waits here for the last section's end."""
        return {name: section.take() for name, section in self._sections.items()}


class _Clocked:
    """A section by the host's clock."""

    def __init__(self, timer: SectionTimer, name: str) -> None:
        self._timer, self._name, self._seconds, self._started = timer, name, 0.0, 0.0
        self._range: profiler.record_function | None = None

    def __enter__(self) -> None:
        self._timer.current = self._name
        if profiler._is_profiler_enabled:
            self._range = profiler.record_function(self._name)
            self._range.__enter__()
        self._started = time.perf_counter()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._seconds += time.perf_counter() - self._started
        if self._range is not None:
            self._range.__exit__(kind, error, trace)
            self._range = None
        self._timer.current = ""

    def take(self) -> float:
        seconds, self._seconds = self._seconds, 0.0
        return seconds


class _Streamed(_Clocked):
    """A section by events in the current stream of the GPU; the events are used again."""

    def __init__(self, timer: SectionTimer, name: str) -> None:
        super().__init__(timer, name)
        self._pairs: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._used = 0

    def __enter__(self) -> None:
        super().__enter__()
        if self._used == len(self._pairs):
            self._pairs.append((torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)))
        self._pairs[self._used][0].record()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pairs[self._used][1].record()
        self._used += 1
        super().__exit__(kind, error, trace)

    def take(self) -> float:
        super().take()
        pairs, self._used = self._pairs[: self._used], 0
        if not pairs:
            return 0.0
        pairs[-1][1].synchronize()
        return sum(start.elapsed_time(end) for start, end in pairs) / 1e3
