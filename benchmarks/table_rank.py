"""One rank of the table benchmark: makes the table and the dense model as the trainer does, then steps when it is told.

Reads lines `steps N` on stdin and answers each with one line of JSON; the first line tells how the tables were made.
Ids of histories follow a log-uniform law over the catalogue (p(id) ∝ 1/rank, Zipf with exponent 1), ranks scattered
over the ids so that popular rows lie on all ranks; negatives are uniform and the same number at every size.

    python -m benchmarks.table_rank '{"rows": 10000, "precision": "fp32", …}'
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
import torch.distributed as dist

from data_pipeline.format import Manifest
from data_pipeline.splits import LeaveOneOut
from genatt_dist import config as configuration
from genatt_dist.config import RunConfig
from genatt_dist.data.batches import Batch, TrainingBatches
from genatt_dist.data.sequences import Sequences
from genatt_dist.embedding.sharded import ShardedTable
from genatt_dist.loss.objective import Candidature
from genatt_dist.training.engine import Engine, init_process_group, sum_over_ranks
from genatt_dist.training.step import DenseModel, JointStep

_SEED = 11
_SCATTER = 7_654_321  # a prime larger than no catalogue's factor: rank·p mod V meets every id
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Work:
    """What one group of ranks trains. rows: items; length: of every history."""

    rows: int
    width: int
    precision: str
    optimizer: str
    batch_sequences: int
    length: int
    negatives: int
    users: int

    @property
    def config(self) -> RunConfig:
        return configuration.parse(
            {
                "data": {"path": "-", "max_len": self.length},
                "model": {"hidden_size": self.width, "dropout": 0.0},
                "table": {"kind": "sharded", "optimizer": self.optimizer, "precision": self.precision},
                "loss": {"kind": "sampled", "num_negatives": self.negatives},
                "training": {"batch_sequences": self.batch_sequences, "zero_stage": 1},
                "world_size": int(os.environ["WORLD_SIZE"]),
            },
            "of the benchmark",
        )


def sequences(work: Work) -> Sequences:
    """Histories of `users` users, each of the batch's length with its targets."""
    size = work.length + 3  # one more as target, two held out
    uniform = np.random.default_rng(_SEED).random((work.users, size))
    rank = np.exp(uniform * np.log(work.rows)).astype(np.int64)  # 1 … rows, p ∝ 1/rank
    items = (rank * _SCATTER % work.rows + 1).astype(np.int32).reshape(-1)
    lengths = np.full(work.users, size)
    places = np.stack([lengths - 2, lengths - 2, lengths - 1])
    manifest = Manifest.model_construct(name="in memory", split=LeaveOneOut(), num_items=work.rows)  # type: ignore[call-arg]
    return Sequences.of(items, lengths, places, manifest)


def memory() -> dict[str, int]:
    """Peak and present resident bytes of this process, as the kernel counts them."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {name: 1024 * int(fields[key].split()[0]) for name, key in (("peak", "VmHWM"), ("now", "VmRSS"))}


class Rank:
    """What a rank holds, and its steps."""

    def __init__(self, work: Work) -> None:
        config = work.config
        data = sequences(work)
        torch.manual_seed(_SEED)
        self._engine = Engine(DenseModel(config, work.rows), config.training)
        before, began = memory(), time.perf_counter()
        self._table = ShardedTable(
            work.rows, work.width, config.table, config.table_learning_rate, config.training.seed, CPU
        )
        shards = self._table.shards
        self.made: dict[str, Any] = {
            "seconds": time.perf_counter() - began,
            "before": before,
            "after": memory(),
            "row_bytes": sum(shard.rows.nbytes for shard in shards),
            "state_bytes": sum(state.nbytes for shard in shards for state in shard.optimizer.values()),
        }
        popularity = torch.from_numpy(data.popularity[1:])
        candidature = Candidature(config.loss, work.rows, popularity, CPU)
        self._step = JointStep(config, self._engine, candidature, self._table, dist.get_world_size(), sum_over_ranks)
        plan = TrainingBatches.plan(data, config.data, config.training)
        self._batches: list[Batch] = list(plan.iterate(0, 0, dist.get_rank(), dist.get_world_size(), CPU))
        self._number = 0
        self._engine.train(True)

    def steps(self, count: int) -> dict[str, Any]:
        """Seconds of each of `count` steps, from one barrier to the next update's end."""
        seconds = []
        for _ in range(count):
            batch = self._batches[self._number % len(self._batches)]
            dist.barrier()
            began = time.perf_counter()
            losses = self._step([batch], self._number, 0.0)
            seconds.append(time.perf_counter() - began)
            self._number += 1
        return {"seconds": seconds, "loss": float(sum_over_ranks(losses.recommendation)), "memory": memory()}


def main() -> None:
    """Answer until stdin ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries that print do not spoil the answers
    init_process_group(CPU)
    rank = Rank(Work(**json.loads(sys.argv[1])))
    _tell(answers, rank.made)
    for line in sys.stdin:
        _tell(answers, rank.steps(int(line.split()[1])))
    dist.destroy_process_group()


def _tell(answers: TextIO, answer: dict[str, Any]) -> None:
    answers.write(json.dumps(answer) + "\n")
    answers.flush()


def argument(work: Work) -> str:
    """The command line's argument for `work`."""
    return json.dumps(dataclasses.asdict(work))


if __name__ == "__main__":
    main()
