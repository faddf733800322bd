"""How fast a run trained and where the time went: numbers for each line of the log, and the run's `performance` at its
end.

All of it is of this process alone: a resumed run measures afresh. Its first interval of the log, in which libraries
make their buffers and operations are counted, is left out as soon as there is another.
"""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from genatt_dist.data.batches import Batch
from genatt_dist.training.exchange import ExchangeTimer
from genatt_dist.training.flops import Count, counted, matmul_peak
from genatt_dist.training.timing import SECTIONS, SectionTimer

_GIB = 1 << 30
_COUNTED_STEP = 1  # the second one of this process: the first may make things that later ones find made
_WATCHED_EVERY, _WATCHED_FIRST = 10, 2  # steps whose exchange is timed
_WATCHED_LEAST = 3  # before ranks are compared
SLOW = 1.5  # times the others' median


@dataclass
class _Interval:
    """Between two lines of the log. sequences, tokens: of the global batches. sections: this rank's seconds. watched:
    updates whose exchange was timed, `watched_seconds` of them, `exchange_seconds` in it.
    """

    seconds: float = 0.0
    steps: int = 0
    sequences: int = 0
    tokens: int = 0
    sections: dict[str, float] = field(default_factory=lambda: dict.fromkeys(SECTIONS, 0.0))
    watched: int = 0
    watched_seconds: float = 0.0
    exchange_seconds: float = 0.0

    def add(self, other: _Interval) -> None:
        self.seconds, self.steps = self.seconds + other.seconds, self.steps + other.steps
        self.sequences, self.tokens = self.sequences + other.sequences, self.tokens + other.tokens
        self.watched, self.watched_seconds = self.watched + other.watched, self.watched_seconds + other.watched_seconds
        self.exchange_seconds += other.exchange_seconds
        for name, seconds in other.sections.items():
            self.sections[name] += seconds

    @property
    def own_seconds(self) -> float:
        """Of a step, what this rank needs for itself: all but standing still for other ranks."""
        return (self.watched_seconds - self.exchange_seconds) / self.watched + self.sections["input"] / self.steps


class Performance:
    """What one rank measures of its training steps. Rank 0 also counts the operations of one step."""

    def __init__(self, device: torch.device, dtype: torch.dtype, rank: int, world_size: int) -> None:
        """dtype: that the dense model computes in."""
        self.timer = SectionTimer(device)
        self._device, self._dtype, self._rank, self._world_size = device, dtype, rank, world_size
        self._first, self._rest, self._open = _Interval(), _Interval(), _Interval()
        self._steps, self._count = 0, Count()
        self._exchange = ExchangeTimer(device)
        self._compared, self._slow = _Interval(), set[int]()

    @contextmanager
    def step(self, batches: Sequence[Batch]) -> Iterator[None]:
        """Around one update with these batches."""
        watched = self._world_size > 1 and self._steps % _WATCHED_EVERY == _WATCHED_FIRST
        with (
            counted() if self._rank == 0 and self._steps == _COUNTED_STEP else nullcontext(self._count) as self._count,
            self._exchange.watching() if watched else nullcontext(),
        ):
            yield
        self._steps += 1
        self._open.watched += watched
        self._open.steps += 1
        self._open.sequences += sum(batch.num_sequences for batch in batches)
        self._open.tokens += sum(batch.num_tokens for batch in batches)

    def interval(self, since: float) -> tuple[float, dict[str, float]]:
        """The steps since the last call, the first of which began when `time.perf_counter` gave `since`: their seconds,
        and numbers for the log, of this rank: shares of that time, peaks of memory in GiB.
        """
        done, self._open = self._open, _Interval()
        done.sections = self.timer.take()  # first: on a GPU the steps end here
        done.watched_seconds, done.exchange_seconds = self._exchange.take()
        done.seconds = seconds = time.perf_counter() - since
        self._compared.add(done)
        (self._rest if self._first.steps else self._first).add(done)
        share = {name: round(spent / seconds, 4) for name, spent in done.sections.items()}
        host, device = _peak_memory(self._device)
        return seconds, {
            "sequences_per_second": round(done.sequences / seconds, 1),
            "tokens_per_second": round(done.tokens / seconds, 1),
            "step_seconds": round(seconds / done.steps, 6),
            "input_stall": share["input"],
            **{f"{name}_share": share[name] for name in SECTIONS[1:]},
            **({"exchange_share": round(done.exchange_seconds / done.watched_seconds, 4)} if done.watched else {}),
            "memory_gib": round(host / _GIB, 3),
            **({"device_memory_gib": round(device / _GIB, 3)} if self._device.type == "cuda" else {}),
        }

    def slow_ranks(self, total: Callable[[Tensor], Tensor]) -> list[str]:
        """A line for each rank that lately needed `SLOW` times as long for itself as the others do; each is told once.
        Collective.

        total: sums a tensor over ranks.
        """
        if self._world_size == 1 or self._compared.watched < _WATCHED_LEAST:
            return []
        own_R = torch.zeros(self._world_size, dtype=torch.float64)
        own_R[self._rank] = self._compared.own_seconds
        seconds, self._compared = total(own_R.to(self._device)).tolist(), _Interval()
        lines = []
        for rank, own in enumerate(seconds):
            others = statistics.median(seconds[:rank] + seconds[rank + 1 :])
            if own > SLOW * others and rank not in self._slow:
                self._slow.add(rank)
                lines.append(
                    f"rank {rank} is slow: {1e3 * own:.1f} ms a step for itself, {own / others:.1f} times as long as "
                    "the others, who wait for it: see what else runs on its host (heartbeat.json names it), its clock, "
                    "and how it reads its data"
                )
        return lines

    def summary(self, total: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        """The `performance` of summary.json; empty where this process did no step. Collective; rank 0's is whole.

        total: sums a tensor over ranks.
        """
        spent = self._rest if self._rest.steps else self._first
        if not spent.steps:
            return {}
        measured_M = [*(size / _GIB for size in _peak_memory(self._device)), *spent.sections.values()]
        measured_M += [spent.exchange_seconds / spent.watched, spent.own_seconds] if spent.watched else [0.0, 0.0]
        table_RM = torch.zeros(self._world_size, len(measured_M), dtype=torch.float64)
        table_RM[self._rank] = torch.tensor(measured_M)
        table_RM = total(table_RM.to(self._device)).cpu()
        sections = dict(zip(SECTIONS, (table_RM[:, 2:-2].mean(0) / spent.steps).tolist(), strict=True))
        step_seconds = spent.seconds / spent.steps
        memory = {"host": table_RM[:, 0], "device": table_RM[:, 1]}
        return {
            "steps": spent.steps,
            "sequences_per_second": round(spent.sequences / spent.seconds, 1),
            "tokens_per_second": round(spent.tokens / spent.seconds, 1),
            "step_seconds": {
                "total": round(step_seconds, 6),
                **{name: round(seconds, 6) for name, seconds in sections.items()},
                "other": round(max(0.0, step_seconds - sum(sections.values())), 6),
            },
            "input_stall": round(sections["input"] / step_seconds, 4),
            **(self._exchanged(spent, table_RM[:, -2], table_RM[:, -1]) if spent.watched else {}),
            "peak_memory_gib": {
                name: [round(size, 3) for size in sizes_R.tolist()] for name, sizes_R in memory.items() if sizes_R.any()
            },
            **(self._against_peak(step_seconds) if self._rank == 0 else {}),
        }

    def _exchanged(self, spent: _Interval, exchange_R: Tensor, own_R: Tensor) -> dict[str, Any]:
        """Of a step: seconds that ranks stand still for each other (their mean), the share of it, and what each rank
        needs for itself.
        """
        seconds = float(exchange_R.mean())
        return {
            "exchange_seconds": round(seconds, 6),
            "exchange_share": round(seconds * spent.watched / spent.watched_seconds, 4),
            "own_seconds": [round(own, 6) for own in own_R.tolist()],
        }

    def _against_peak(self, step_seconds: float) -> dict[str, Any]:
        """Rank 0's work against what its device reaches in one large matrix product, measured now."""
        peak, flops = matmul_peak(self._device, self._dtype), self._count.flops
        return {
            "flops_per_step": flops or None,
            "matmul_peak_flops": round(peak),
            "fraction_of_matmul_peak": round(flops / step_seconds / peak, 4) if flops else None,
            "precision": str(self._dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
        }


def _peak_memory(device: torch.device) -> tuple[int, int]:
    """Most bytes that this process had resident, and most that torch held of its GPU."""
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return resident, torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
