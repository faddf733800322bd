"""What one rank of a row does: the product's own step on histories in memory, made as the trainer makes it.

`measure_rank` is the whole life of a rank, for any launcher that has set RANK, WORLD_SIZE and the master's address.
Ids follow p(id) ∝ 1/rank over the catalogue, every history is `max_len` long and every rank's batch has equal tokens
(`benchmarks/table_rank.py` draws them), so that rows of one cell differ in nothing but their ranks.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from benchmarks import table_rank
from benchmarks.scaling.grid import Spec
from genatt_dist.data.batches import Batch, TrainingBatches
from genatt_dist.loss.objective import Candidature
from genatt_dist.training.engine import Engine, init_process_group, select_device, sum_over_ranks
from genatt_dist.training.step import DenseModel, JointStep
from genatt_dist.training.timing import SectionTimer

_GAMMA = 1.0
_BATCHES = 8  # of an epoch


class Subject:
    """The model, its table and its batches on this rank. Needs an initialised process group."""

    def __init__(self, spec: Spec, device: torch.device) -> None:
        self.spec, self._device = spec, device
        config = spec.config
        data = table_rank.sequences(
            table_rank.Work(
                rows=spec.items,
                width=spec.width,
                precision="fp32",
                optimizer=config.table.optimizer,
                batch_sequences=spec.batch,
                length=spec.max_len,
                negatives=config.loss.num_negatives,
                users=_BATCHES * spec.batch,
            )
        )
        torch.manual_seed(config.training.seed)
        self._engine = Engine(DenseModel(config, spec.items), config.training)
        table = None
        if config.table.kind == "sharded":
            from genatt_dist.embedding.sharded import ShardedTable

            rate = config.table_learning_rate
            table = ShardedTable(spec.items, spec.width, config.table, rate, config.training.seed, device)
        candidature = Candidature(config.loss, spec.items, torch.from_numpy(data.popularity[1:]), device)
        timer, world_size = SectionTimer(device), dist.get_world_size()
        self._step = JointStep(config, self._engine, candidature, table, world_size, sum_over_ranks, timer)
        self._engine.train(True)
        self._plan = TrainingBatches.plan(data, config.data, config.training)
        self._batches, self._number = timer.waiting(self._endless()), 0

    def _endless(self) -> Iterator[Batch]:
        epoch = 0
        while True:
            yield from self._plan.iterate(epoch, 0, dist.get_rank(), dist.get_world_size(), self._device)
            epoch += 1

    def step(self) -> torch.Tensor:
        """One update, from asking for the batch to the end of the optimizers' work (on a GPU: to its launch)."""
        losses = self._step([next(self._batches)], self._number, _GAMMA)
        self._number += 1
        return losses.recommendation

    def steps(self, count: int) -> list[float]:
        """Seconds of each of `count` steps; ranks of one group begin together."""
        seconds = []
        dist.barrier()
        self._settle()
        began = time.perf_counter()
        for _ in range(count):
            self.step()
            self._settle()
            ended = time.perf_counter()
            seconds.append(ended - began)
            began = ended
        return seconds

    def _settle(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize()


def measure_rank(spec: Spec, warmup: int = 3, steps: int = 10, profile_steps: int = 0) -> dict[str, Any]:
    """This rank's seconds of each step, and of a step's parts where `profile_steps` are asked for. The process group's
    variables are in the environment; the group is made here and ended.
    """
    from benchmarks.scaling.breakdown import profiled

    device = select_device()
    init_process_group(device)
    try:
        subject = Subject(spec, device)
        subject.steps(warmup)
        seconds = subject.steps(steps)
        parts = profiled(subject.steps, profile_steps, None) if profile_steps else None
        return {"rank": dist.get_rank(), "median": statistics.median(seconds), "seconds": seconds, "parts": parts}
    finally:
        dist.destroy_process_group()
