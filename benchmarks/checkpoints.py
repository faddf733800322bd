"""What saving costs a training step: nothing saved, saved in the foreground, saved in the background.

    python -m benchmarks.checkpoints --out benchmarks/results/checkpoints.json

Two ranks (gloo, one thread each) train the product's step on a sharded table (`benchmarks/table_rank.py` states batch,
negatives and law of the ids). Blocks of equal numbers of steps take turns; a block saves at its beginning and ends when
its checkpoint is complete. `stall`: seconds from the save's beginning until training goes on. `block`: seconds of the
whole block, of which the excess over one that saves nothing is what the checkpoint costs in all. The plot lies beside
FILE, as PNG.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from genatt_dist.launch.launchers import worker_environment

RANKS = 2
MODES = ("none", "foreground", "background")
_LIMIT_SECONDS = 1800


def rank(task: dict[str, Any]) -> None:
    """One rank of the measurement: its figures go to a file in `task["directory"]`."""
    import torch
    import torch.distributed as dist

    from benchmarks.table_rank import CPU, Rank, Work, memory
    from genatt_dist.training.checkpoint.progress import Progress
    from genatt_dist.training.checkpoint.store import Store
    from genatt_dist.training.engine import init_process_group
    from genatt_dist.training.options import CheckpointConfig
    from genatt_dist.training.saving import Saver

    init_process_group(CPU)
    work = Work(**task["work"])
    trained, figures, step = Rank(work), [], 0
    store = Store(f"{task['directory']}/checkpoints", task["directory"])
    savers = {}
    for mode in MODES[1:]:
        checkpoint = CheckpointConfig(background=mode == "background")
        training = work.config.training.model_copy(update={"checkpoint": checkpoint})
        config = work.config.model_copy(update={"training": training})
        savers[mode] = Saver(store, config, trained._engine, trained._table, torch.device("cpu"))
    trained.steps(3)
    for number in range(task["rounds"]):
        for mode in np.roll(MODES, number):
            dist.barrier()
            before, began, stall = memory()["now"], time.perf_counter(), 0.0
            if saver := savers.get(mode):
                step += 1
                saver.save(Progress("benchmark", step, best_step=step))
                stall = time.perf_counter() - began
            seconds = trained.steps(task["steps"])["seconds"]
            after = memory()["now"]
            if saver:
                saver.wait()
            dist.barrier()
            block = time.perf_counter() - began
            figures.append(
                {"mode": str(mode), "stall": stall, "block": block, "steps": seconds, "resident_bytes": [before, after]}
            )
    held = sum(shard.rows.nbytes + sum(map(_size, shard.optimizer.values())) for shard in trained._table.shards)
    answer = {"held_bytes": held, "peak_bytes": memory()["peak"], "blocks": figures}
    Path(task["directory"], f"rank-{dist.get_rank()}.json").write_text(json.dumps(answer))
    dist.destroy_process_group()


def _size(tensor: Any) -> int:
    return int(tensor.nbytes)


def measure(task: dict[str, Any]) -> list[dict[str, Any]]:
    """What both ranks found."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for number in range(RANKS):
        own = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": RANKS, "LOCAL_WORLD_SIZE": RANKS}
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1, "DS_ACCELERATOR": "cpu"}
        environment = dict(os.environ) | {name: str(value) for name, value in (own | address).items()}
        command = [sys.executable, "-m", "benchmarks.checkpoints", "--rank", json.dumps(task)]
        processes.append(subprocess.Popen(command, env=worker_environment(environment, RANKS)))
    try:
        if any(process.wait(_LIMIT_SECONDS) for process in processes):
            raise SystemExit("a rank failed: its messages are above")
    finally:
        for process in processes:
            process.kill()
    return [json.loads(Path(task["directory"], f"rank-{number}.json").read_text()) for number in range(RANKS)]


def summary(ranks: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Medians over rounds of the slower rank: stall, block and its excess over nothing saved, and the step."""
    found = {}
    for mode in MODES:
        pairs = [pair for pair in zip(*(one["blocks"] for one in ranks), strict=True) if pair[0]["mode"] == mode]
        found[mode] = {
            "stall_seconds": statistics.median(max(one["stall"] for one in pair) for pair in pairs),
            "block_seconds": statistics.median(max(one["block"] for one in pair) for pair in pairs),
            "step_seconds": statistics.median(
                max(both) for pair in pairs for both in zip(*(one["steps"] for one in pair), strict=True)
            ),
        }
    for mode in MODES:
        found[mode]["excess_seconds"] = found[mode]["block_seconds"] - found["none"]["block_seconds"]
    return found


def draw(ranks: list[dict[str, Any]], path: Path) -> None:
    """Stall and block of every mode: the medians as bars, every round as a point (PNG)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    found = summary(ranks)
    figure = Figure(figsize=(9, 4), layout="constrained")
    FigureCanvasAgg(figure)
    pictures = zip(figure.subplots(1, 2), ("stall", "block"), ("training stands still", "a block, all in"), strict=True)
    for axes, name, title in pictures:
        axes.bar(MODES, [found[mode][f"{name}_seconds"] for mode in MODES], color=["#999999", "#d1672a", "#1f6feb"])
        for pair in zip(*(one["blocks"] for one in ranks), strict=True):
            axes.plot(pair[0]["mode"], max(one[name] for one in pair), "k.", alpha=0.5)
        axes.set_ylabel("seconds"), axes.set_title(title), axes.grid(alpha=0.25, axis="y")
    figure.savefig(path, dpi=100)


def main() -> None:
    """Measure, print, write and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--steps", type=int, default=30, help="of a block")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rank", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank:
        rank(json.loads(arguments.rank))
        return
    work = {
        "rows": arguments.rows, "width": 64, "precision": "fp32", "optimizer": "rowwise_adagrad",
        "batch_sequences": 64, "length": 50, "negatives": 256, "users": 2048,
    }  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="checkpoints-", dir=Path.cwd()) as directory:
        task = {"work": work, "directory": directory, "steps": arguments.steps, "rounds": arguments.rounds}
        ranks = measure(task)
    found = summary(ranks)
    result = {
        "host": {"cpu_count": os.cpu_count(), "platform": platform.platform()},
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "torchrec", "deepspeed")},
        "work": work | {"ranks": RANKS, "steps": arguments.steps, "rounds": arguments.rounds},
        "held_bytes": [one["held_bytes"] for one in ranks],
        "summary": found,
    }
    print(json.dumps(result["summary"], indent=1))
    if arguments.out:
        arguments.out.write_text(json.dumps(result | {"ranks": ranks}, indent=1) + "\n")
        draw(ranks, arguments.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
