"""Seconds of the collectives that a training step uses, by size, on the ranks of this process group."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

_RUN: dict[str, Callable[[Tensor, Tensor], object]] = {
    "all_reduce": lambda whole, part: dist.all_reduce(whole),
    "all_gather": lambda whole, part: dist.all_gather_single(whole, part),
    "reduce_scatter": lambda whole, part: dist.reduce_scatter_single(part, whole),
    "all_to_all": lambda whole, part: dist.all_to_all_single(torch.empty_like(whole), whole),
}
KINDS = tuple(_RUN)
SIZES = (1 << 10, 1 << 14, 1 << 18, 1 << 20, 1 << 22, 1 << 24)
_LONGEST = 1.0  # seconds that the repeats of one size may take


def timed(sizes: list[int], repeats: int, device: torch.device) -> list[dict[str, float | str]]:
    """A row for each kind and size. bytes: as `plan.cost.Link` counts them: of the reduced tensor; of what every rank
    has in the end (all_gather, and before a reduce_scatter); of what a rank sends (all_to_all). seconds: the median
    over repeats of the slowest rank's.
    """
    rows: list[dict[str, float | str]] = []
    world_size = dist.get_world_size()
    for kind in KINDS:
        for size in sizes:
            numbers = max(1, size // 4 // world_size) * world_size
            whole, part = torch.ones(numbers, device=device), torch.ones(numbers // world_size, device=device)
            seconds = _median(partial(_RUN[kind], whole, part), repeats, device)
            rows.append({"kind": kind, "bytes": 4.0 * numbers, "seconds": seconds})
    return rows


def _median(run: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Over repeats, of the slowest rank; fewer repeats where they are long, the same on all ranks."""
    first = _once(run, device)
    count = max(3, min(repeats, int(_LONGEST / max(first, 1e-9))))
    return statistics.median(_once(run, device) for _ in range(count))


def _once(run: Callable[[], object], device: torch.device) -> float:
    dist.barrier()
    began = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    slowest = torch.tensor(time.perf_counter() - began, dtype=torch.float64, device=device)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return float(slowest)
