"""What keyed noise costs: its share of a training step, by attention, loss and lengths.

    python -m benchmarks.noise --shards shards/amazon-beauty --out benchmarks/results/noise_cost.json

Every draw of a step (keys, dropout masks, latents, diffusion noise, times) is made by a public function of
`genatt_dist.attention.noise`. `Draws` stands between these and their callers, and steps of two kinds take turns in one
process:

- `noise_share`: time inside the draws / time of the step. The figure to quote.
- `replay_share`: 1 − time of a step that is handed the draws of an earlier one / time of one that makes them. No clock
  inside the step; its error is that of a difference of two steps.

A step is forward, backward and AdamW at full width: n = 50, d = 64, 2 blocks, dropout 0.5, 256 sequences on average, a
replicated table of 12,101 items. `full` is the loss of configs/beauty_dot_product.yaml; with `sampled` (256 negatives)
the softmax is nearly free, so that noise has the largest share it can have. `milliseconds` are CPU time of one thread,
which other work on the machine hardly touches. GPUs are not measured: the host's clock says nothing of a draw there.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import multiprocessing
import os
import platform
import statistics
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from pathlib import Path
from time import process_time
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from genatt_dist import config as configuration
from genatt_dist.attention import noise
from genatt_dist.config import DataConfig, TrainingConfig
from genatt_dist.data.batches import Batch, TrainingBatches
from genatt_dist.data.sequences import Sequences
from genatt_dist.launch.launchers import worker_environment
from genatt_dist.loss.objective import Candidature
from genatt_dist.model.context import identity
from genatt_dist.model.jagged import Jagged
from genatt_dist.training.step import DenseModel, JointStep, Losses

ATTENTIONS = ("dot_product", "variational", "diffusion")
LOSSES = ("full", "sampled")
MAX_LEN, BATCH, ITEMS = 50, 256, 12_101
_FUNCTIONS = ("derive", "bits", "uniform", "normal", "keep_mask", "integers")
_METHODS = ("make", "token", "sequence")  # of NoiseKey


class Draws:
    """Stands in for the public functions of the noise module in every module that has imported them.

    It clocks them (`seconds` of CPU time since `start`), and keeps what they return or, in a replay, returns what was
    kept in their stead. A draw made inside another one is part of it.
    """

    def __init__(self) -> None:
        self.seconds, self._inside = 0.0, False
        self._kept: list[Any] = []
        self._replayed: int | None = None
        wrapped = {getattr(noise, name): self._wrap(getattr(noise, name)) for name in _FUNCTIONS}
        for module in [module for name, module in sys.modules.items() if name.startswith("genatt_dist")]:
            for name, value in list(vars(module).items()):
                if callable(value) and getattr(value, "__module__", None) == noise.__name__ and value in wrapped:
                    setattr(module, name, wrapped[value])
        for name in _METHODS:
            method = self._wrap(getattr(noise.NoiseKey, name))
            setattr(noise.NoiseKey, name, staticmethod(method) if name == "make" else method)

    def start(self, kept: list[Any], replay: bool) -> None:
        """Begin a step whose draws are those of `kept`, or are kept there."""
        self.seconds, self._kept, self._replayed = 0.0, kept, 0 if replay else None
        if not replay:
            kept.clear()

    def _wrap(self, draw: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*arguments: Any) -> Any:
            if self._inside:
                return draw(*arguments)
            if self._replayed is not None:
                self._replayed += 1
                return self._kept[self._replayed - 1]
            self._inside, started = True, process_time()
            drawn = draw(*arguments)
            self._inside, self.seconds = False, self.seconds + process_time() - started
            self._kept.append(drawn)
            return drawn

        return wrapper


class _Plain:
    """The engine that a joint step wants, without DeepSpeed: what that adds is neither model nor noise."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model.train()
        self._optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def __call__(self, *arguments: Any) -> Losses:
        losses: Losses = self._model(*arguments)
        return losses

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self) -> None:
        self._optimizer.step()
        self._optimizer.zero_grad()


def make_batches(shards: str | None, count: int) -> list[Batch]:
    """`count` training batches of random items: with the lengths of the first epoch over `shards`, or full windows."""
    lengths = [torch.full((BATCH,), MAX_LEN)] * count
    if shards is not None:
        data, training = DataConfig(path=shards, max_len=MAX_LEN), TrainingConfig(batch_sequences=BATCH)
        plan = TrainingBatches.plan(Sequences.read(shards), data, training)
        lengths = [torch.from_numpy(batch.length_B) for batch in islice(plan.epoch(0), count)]
    batches, generator = [], torch.Generator().manual_seed(0)
    for lengths_B in lengths:
        tokens, size = int(lengths_B.sum()), len(lengths_B)
        batches.append(
            Batch(
                items_M=torch.randint(1, ITEMS + 1, (tokens + size,), generator=generator),
                layout=Jagged.of(lengths_B, int(lengths_B.max()), tokens),
                window_B=torch.arange(size),
                chosen=None,
                num_tokens=tokens,
                num_targets=tokens,
                num_sequences=size,
            )
        )
    return batches


def measure(attention: str, loss: str, shards: str | None, num_batches: int, repeats: int) -> dict[str, Any]:
    """The row of one setting: medians over `repeats` rounds, each of which takes every batch once with new draws and
    once with old ones.
    """
    tree = {
        "data": {"path": "none", "max_len": MAX_LEN},
        "model": {"hidden_size": 64, "num_blocks": 2, "dropout": 0.5, "attention": {"type": attention}},
        "loss": {"kind": loss},
    }
    config = configuration.parse(tree, "of the benchmark")
    torch.manual_seed(0)
    engine, cpu = _Plain(DenseModel(config, ITEMS)), torch.device("cpu")
    step = JointStep(config, engine, Candidature(config.loss, ITEMS, torch.ones(ITEMS), cpu), None, 1, identity)
    batches = make_batches(shards, num_batches)
    draws, kept = Draws(), [list[Any]() for _ in batches]

    def seconds(index: int, replay: bool) -> float:
        draws.start(kept[index], replay)
        started = process_time()
        step([batches[index]], index, 1.0)
        return process_time() - started

    for index in range(num_batches):  # warms up, and fills `kept`
        seconds(index, replay=False)
    steps, noise_shares, replay_shares = [], [], []
    for repeat in range(repeats):
        drawing = replaying = noise_seconds = 0.0
        for index in range(num_batches):
            for replay in (False, True) if (repeat + index) % 2 else (True, False):
                if replay:
                    replaying += seconds(index, replay)
                else:
                    drawing += seconds(index, replay)
                    noise_seconds += draws.seconds
        steps.append(drawing / num_batches)
        noise_shares.append(noise_seconds / drawing)
        replay_shares.append(1 - replaying / drawing)
    return {
        "attention": attention,
        "loss": loss,
        "lengths": "all 50" if shards is None else Path(shards).name,
        "tokens": round(statistics.mean(batch.num_tokens for batch in batches)),
        "milliseconds": round(1e3 * statistics.median(steps), 2),
        "noise_share": round(statistics.median(noise_shares), 4),
        "noise_share_range": [round(min(noise_shares), 4), round(max(noise_shares), 4)],
        "replay_share": round(statistics.median(replay_shares), 4),
    }


def main() -> None:
    """Measure each setting in a process of its own and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", required=True, help="what `genatt prepare` published: the law of the lengths")
    parser.add_argument("--batches", type=int, default=2, help="batches of a round")
    parser.add_argument("--repeats", type=int, default=5, help="rounds of a setting")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()

    # Children read it when they start: glibc at exec, torch at import. One thread, so that CPU time is time.
    os.environ.update({**worker_environment(os.environ, 1), "OMP_NUM_THREADS": "1"})
    console, rows = Console(stderr=True), []
    for shards in (None, arguments.shards):
        for attention in ATTENTIONS:
            for loss in LOSSES:
                with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
                    row = pool.submit(measure, attention, loss, shards, arguments.batches, arguments.repeats).result()
                console.print(row)
                rows.append(row)
    largest = {loss: max(row["noise_share"] for row in rows if row["loss"] == loss) for loss in LOSSES}
    result = {
        "command": f"python -m benchmarks.noise --shards DIR --batches {arguments.batches} "
        f"--repeats {arguments.repeats} --out FILE",
        "threads": 1,
        "cores": os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "versions": {"torch": importlib.metadata.version("torch")},
        "largest_noise_share": largest,
        "rows": rows,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    shares = ", ".join(f"{share:.1%} with the {loss} loss" for loss, share in largest.items())
    console.print(f"keyed noise takes at most {shares} → {arguments.out}")


if __name__ == "__main__":
    main()
