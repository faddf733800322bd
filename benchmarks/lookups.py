"""What looking each id up once saves, and what exchanging the next step's ids early would: on two gloo ranks.

    python -m benchmarks.lookups --out benchmarks/results/lookups.json

A step looks up the ids of a batch (p(id) ∝ 1/rank over the catalogue, and uniform negatives that both ranks share),
computes for about `--dense-ms` as the dense model would, and goes back through the rows. `once` is the product's
lookup; `repeated` sends every id as often as it stands in the batch; `ahead` is `once` with the exchange of the next
step's ids begun before the dense part, as TorchRec's TrainPipelineSparseDist does. Variants take turns in the same
processes.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from genatt_dist.config import TableConfig
from genatt_dist.embedding.sharded import ShardedTable
from genatt_dist.embedding.table import ITEM_TABLE
from genatt_dist.launch.launchers import worker_environment
from genatt_dist.training.engine import init_process_group

RANKS, _SEED = 2, 5


class Rank:
    """A table, the ids of some steps, and a step in each variant."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._table = ShardedTable(
            options.rows, options.width, TableConfig(kind="sharded"), 0.01, _SEED, torch.device("cpu")
        )
        self._module = self._table._model.module
        own, shared = (np.random.default_rng(seed) for seed in (_SEED + dist.get_rank(), _SEED + RANKS))
        self.ids = []
        for _ in range(options.steps + 1):
            popular = np.exp(own.random(options.ids) * np.log(options.rows)).astype(np.int64)
            negatives = shared.integers(1, options.rows + 1, options.negatives)
            self.ids.append(torch.from_numpy(np.concatenate((popular * 7_654_321 % options.rows + 1, negatives))))
        self._square = torch.randn(256, 256)
        began = time.perf_counter()
        self._dense(20)
        self._times = max(1, round(options.dense_ms / 1000 / (time.perf_counter() - began) * 20))
        self.variants: dict[str, Callable[[int], None]] = {
            "once": lambda steps: self._steps(steps, unique=True),
            "repeated": lambda steps: self._steps(steps, unique=False),
            "ahead": self._ahead,
        }

    def _dense(self, times: int) -> None:
        for _ in range(times):
            self._square @ self._square

    def _steps(self, steps: int, unique: bool) -> None:
        for ids_N in self.ids[:steps]:
            rows_ND = self._table.lookup(ids_N) if unique else self._table._model(_keyed(ids_N))[ITEM_TABLE].values()
            self._dense(self._times)
            rows_ND.sum().backward()

    def _ahead(self, steps: int) -> None:
        begun = self._begin(self.ids[0])
        for number in range(steps):
            context, ids, inverse_N = begun
            found = self._module.compute_and_output_dist(context, ids.wait())
            rows_ND = found[ITEM_TABLE].values().index_select(0, inverse_N)
            begun = self._begin(self.ids[number + 1])
            self._dense(self._times)
            rows_ND.sum().backward()
        begun[1].wait()

    def _begin(self, ids_N: Tensor) -> tuple[Any, Any, Tensor]:
        """The exchange of ids under way: its context, what to wait for, and where each id stands among them."""
        unique, inverse_N = ids_N.unique(return_inverse=True)
        context = self._module.create_context()
        return context, self._module.input_dist(context, _keyed(unique)).wait(), inverse_N


def _keyed(ids_N: Tensor) -> KeyedJaggedTensor:
    return KeyedJaggedTensor(keys=[ITEM_TABLE], values=ids_N, lengths=torch.tensor([len(ids_N)]))


def _rank(options: argparse.Namespace) -> None:
    init_process_group(torch.device("cpu"))
    rank = Rank(options)
    seconds: dict[str, list[float]] = {name: [] for name in rank.variants}
    for number in range(options.rounds + 1):
        names = list(rank.variants)
        for name in names if number % 2 else reversed(names):
            dist.barrier()
            began = time.perf_counter()
            rank.variants[name](options.steps)
            dist.barrier()
            if number:  # the first round warms up
                seconds[name].append((time.perf_counter() - began) / options.steps)
    each = 8 + 2 * 4 * options.width  # an id out; its row in, its gradient out, both fp32
    counts = {
        "repeated": statistics.mean(len(ids_N) for ids_N in rank.ids),
        "once": statistics.mean(len(ids_N.unique()) for ids_N in rank.ids),
    }
    if dist.get_rank() == 0:
        answer = {
            "milliseconds": {name: 1000 * statistics.median(each) for name, each in seconds.items()},
            "over_once": {
                name: statistics.median(a / b for a, b in zip(each, seconds["once"], strict=True))
                for name, each in seconds.items()
            },
            "ids_a_step": counts,
            "exchanged_bytes_a_step": {name: count * each for name, count in counts.items()},
        }
        options.out.write_text(json.dumps({"command": options.command, **answer}, indent=1) + "\n")
        print(json.dumps(answer, indent=1))
    dist.destroy_process_group()


def main(arguments: Sequence[str] | None = None) -> int:
    """Start both ranks, which write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--ids", type=int, default=6500, help="of a rank's windows")
    parser.add_argument("--negatives", type=int, default=1024)
    parser.add_argument("--dense-ms", type=float, default=100.0)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--limit", type=float, default=600.0, help="seconds for all")
    parser.add_argument("--command", default="", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, required=True)
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = parser.parse_args(given)
    if "RANK" in os.environ:
        _rank(options)
        return 0
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "benchmarks.lookups", *given]
    processes = []
    for rank in range(RANKS):
        own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": RANKS, "OMP_NUM_THREADS": 1, "DS_ACCELERATOR": "cpu"}
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = dict(os.environ) | {name: str(value) for name, value in (own | address).items()}
        told = ["--command", " ".join(["python -m benchmarks.lookups", *given])]
        processes.append(subprocess.Popen([*command, *told], env=worker_environment(environment, RANKS)))
    deadline = time.monotonic() + options.limit
    try:
        return max(process.wait(max(1.0, deadline - time.monotonic())) for process in processes)
    finally:
        for process in processes:
            process.kill()
            process.wait()


if __name__ == "__main__":
    sys.exit(main())
