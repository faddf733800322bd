"""How fast a run trained and where the time went: numbers for each line of the log, and the run's `performance` at its
end.

All of it is of this process alone: a resumed run measures afresh. Its first interval of the log, in which libraries
make their buffers and operations are counted, is left out as soon as there is another.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from genatt_dist.data.batches import Batch
from genatt_dist.training.flops import Count, counted, matmul_peak
from genatt_dist.training.timing import SECTIONS, SectionTimer

_GIB = 1 << 30
_COUNTED_STEP = 1  # the second one of this process: the first may make things that later ones find made


@dataclass
class _Interval:
    """Between two lines of the log. sequences, tokens: of the global batches. sections: this rank's seconds."""

    seconds: float = 0.0
    steps: int = 0
    sequences: int = 0
    tokens: int = 0
    sections: dict[str, float] = field(default_factory=lambda: dict.fromkeys(SECTIONS, 0.0))

    def add(self, other: _Interval) -> None:
        self.seconds, self.steps = self.seconds + other.seconds, self.steps + other.steps
        self.sequences, self.tokens = self.sequences + other.sequences, self.tokens + other.tokens
        for name, seconds in other.sections.items():
            self.sections[name] += seconds


class Performance:
    """What one rank measures of its training steps. Rank 0 also counts the operations of one step."""

    def __init__(self, device: torch.device, dtype: torch.dtype, rank: int, world_size: int) -> None:
        """dtype: that the dense model computes in."""
        self.timer = SectionTimer(device)
        self._device, self._dtype, self._rank, self._world_size = device, dtype, rank, world_size
        self._first, self._rest, self._open = _Interval(), _Interval(), _Interval()
        self._steps, self._count = 0, Count()

    @contextmanager
    def step(self, batches: Sequence[Batch]) -> Iterator[None]:
        """Around one update with these batches."""
        with counted() if self._rank == 0 and self._steps == _COUNTED_STEP else nullcontext(self._count) as self._count:
            yield
        self._steps += 1
        self._open.steps += 1
        self._open.sequences += sum(batch.num_sequences for batch in batches)
        self._open.tokens += sum(batch.num_tokens for batch in batches)

    def interval(self, since: float) -> tuple[float, dict[str, float]]:
        """The steps since the last call, the first of which began when `time.perf_counter` gave `since`: their seconds,
        and numbers for the log, of this rank: shares of that time, peaks of memory in GiB.
        """
        done, self._open = self._open, _Interval()
        done.sections = self.timer.take()  # first: on a GPU the steps end here
        done.seconds = seconds = time.perf_counter() - since
        (self._rest if self._first.steps else self._first).add(done)
        share = {name: round(spent / seconds, 4) for name, spent in done.sections.items()}
        host, device = _peak_memory(self._device)
        return seconds, {
            "sequences_per_second": round(done.sequences / seconds, 1),
            "tokens_per_second": round(done.tokens / seconds, 1),
            "step_seconds": round(seconds / done.steps, 6),
            "input_stall": share["input"],
            **{f"{name}_share": share[name] for name in SECTIONS[1:]},
            "memory_gib": round(host / _GIB, 3),
            **({"device_memory_gib": round(device / _GIB, 3)} if self._device.type == "cuda" else {}),
        }

    def summary(self, total: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        """The `performance` of summary.json; empty where this process did no step. Collective; rank 0's is whole.

        total: sums a tensor over ranks.
        """
        spent = self._rest if self._rest.steps else self._first
        if not spent.steps:
            return {}
        table_RM = torch.zeros(self._world_size, 2 + len(SECTIONS), dtype=torch.float64)
        own_M = [*(size / _GIB for size in _peak_memory(self._device)), *spent.sections.values()]
        table_RM[self._rank] = torch.tensor(own_M)
        table_RM = total(table_RM.to(self._device)).cpu()
        sections = dict(zip(SECTIONS, (table_RM[:, 2:].mean(0) / spent.steps).tolist(), strict=True))
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
            "exchange_share": round(sections["lookup"] / step_seconds, 4),
            "peak_memory_gib": {
                name: [round(size, 3) for size in sizes_R.tolist()] for name, sizes_R in memory.items() if sizes_R.any()
            },
            **(self._against_peak(step_seconds) if self._rank == 0 else {}),
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
