"""What a row computes and exchanges, as `genatt plan` counts it: the model's own step traced on shapes alone.

The numbers are of no machine; `model` finds what one of each costs. Ids of the benchmark follow p(id) ∝ 1/rank and
travel once each, so that how many do is known.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt

from benchmarks.scaling.grid import Cell, Spec
from genatt_dist.config import RunConfig
from genatt_dist.plan.cost import Collectives, exchanges
from genatt_dist.plan.dense import Dense, dense, train_trace
from genatt_dist.plan.trace import Trace
from genatt_dist.plan.workload import Share

# Of a rank and step. The loop of the recurrence is apart: its operations are small and follow one another.
NAMES = ("matmul flops", "other bytes", "operations", "recurrence bytes", "dense update bytes", "table bytes")


@dataclass(frozen=True)
class Work:
    """A row's step on one rank. amounts: of `NAMES`. chunks: of a full softmax. ids: that a rank looks up."""

    config: RunConfig
    amounts: npt.NDArray[np.float64]
    sizes: Dense
    trace: Trace
    share: Share
    ids: int
    chunks: int

    def exchanged(self, link: Collectives) -> dict[str, float]:
        """Seconds by what ranks tell each other; none where there is one rank."""
        if link.world_size == 1:
            return {}
        return exchanges(self.config, link, self.sizes, self.share, self.ids, self.chunks)


def work(spec: Spec, device: str = "cpu") -> Work:
    """What a rank of the row does."""
    config, world_size = spec.config, spec.world_size
    share = Share(max(1, spec.batch // world_size), spec.max_len)
    sharded = spec.table == "sharded"
    # Of the table in the trace: those that are scored, or have a dense gradient.
    rows = spec.items + 1 if not sharded else -(-(spec.items + 1) // world_size) if spec.loss == "full" else 1
    gathered = world_size if sharded and spec.loss == "full" else 1
    trace = _traced(spec.cell, share, rows, gathered, device)
    sizes = dense(config, spec.items)
    windows = share.tokens + share.sequences
    negatives = config.loss.num_negatives if spec.loss == "sampled" else 0
    ids = round(distinct(spec.items, windows) + negatives)
    owned = sizes.total / (world_size if config.training.zero_stage else 1)
    table = 8.0 * ids * spec.width * 4 if sharded else 0.0
    recurrent, other = trace.work["recurrence"], trace.work["other"]
    amounts = [
        trace.work["matmul"].flops + recurrent.flops,
        other.bytes,
        trace.work["matmul"].calls + other.calls + 4 * sizes.tensors + 60 * sharded,
        recurrent.bytes,
        4 * 7 * owned,
        table,
    ]
    return Work(
        config, np.array(amounts, np.float64), sizes, trace, share, ids, max(1, trace.work["matmul"].calls // 3)
    )


@cache
def distinct(items: int, draws: int) -> float:
    """How many ids are among `draws` ones with p(id) ∝ 1/rank, on average."""
    chance = np.log1p(1 / np.arange(1.0, items)) / np.log(items)  # of ⌊V^u⌋ = rank, as table_rank draws it
    return float(-np.expm1(draws * np.log1p(-chance)).sum())


@cache
def _traced(cell: Cell, share: Share, rows: int, gathered: int, device: str) -> Trace:
    config = Spec(**cell.model_dump(), batch=share.sequences).config
    return train_trace(config, cell.items, rows, share, device, gathered)
