"""Training throughput against a plain PyTorch SASRec, in turns within one process tree.

    python -m benchmarks.throughput --shards shards/amazon-beauty --out benchmarks/results/throughput_beauty.json

Two child processes live at the same time with the same environment (threads, allocator); they take turns, one epoch
each, the first of a round being the last of the round before, so that a noisy machine slows both. A row holds one
round; the figure to quote is the median of the rounds' ratios. The first round warms up and is not kept.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import multiprocessing
import os
import platform
import statistics
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path

from rich.console import Console

from genatt_dist import config as configuration
from genatt_dist.launch.launchers import single_process, worker_environment

CONFIG = "configs/beauty_dot_product.yaml"


def ours(pipe: Connection, shards: str, config: str, overrides: list[str]) -> None:
    """The product's own training step, DeepSpeed engine and all, one epoch a message."""
    from genatt_dist.training.engine import init_process_group, select_device
    from genatt_dist.training.trainer import Trainer

    resolved = configuration.load(config, [*overrides, f"data.path={shards}"])
    device = select_device()
    init_process_group(device)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(Path(folder), resolved, device, "process", resume=False)
        trainer.learner.set_training()
        for epoch in iter(pipe.recv, None):
            sequences, tokens, started = 0, 0, time.perf_counter()
            for batch in trainer.batches.iterate(epoch, 0, 0, 1, device):
                trainer.update([batch], 1.0)
                sequences, tokens = sequences + batch.num_sequences, tokens + batch.num_tokens
            pipe.send((sequences, tokens, time.perf_counter() - started))


def plain(pipe: Connection, shards: str, config: str, overrides: list[str]) -> None:
    """The reference, one epoch a message."""
    from benchmarks.reference.plain_sasrec import PlainSasrec, PlainTraining
    from genatt_dist.data.sequences import Sequences

    resolved = configuration.load(config, [*overrides, f"data.path={shards}"])
    sequences, model = Sequences.read(shards), resolved.model
    training = PlainTraining(
        sequences,
        resolved.data.max_len,
        PlainSasrec(
            sequences.num_items,
            resolved.data.max_len,
            model.hidden_size,
            model.num_blocks,
            model.num_heads,
            model.dropout,
        ),
        resolved.training.batch_sequences,
    )
    for epoch in iter(pipe.recv, None):
        started = time.perf_counter()
        training.epoch(epoch)
        pipe.send((training.num_sequences, training.num_targets, time.perf_counter() - started))


def main() -> None:
    """Run the rounds and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", required=True, help="what `genatt prepare` published")
    parser.add_argument("--config", default=CONFIG)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--default-allocator", action="store_true", help="leave the allocator as glibc has it, for both"
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("overrides", nargs="*", help="section.key=value")
    arguments = parser.parse_args()

    environment = worker_environment({}, 1) | single_process()
    if arguments.default_allocator:
        environment = {name: value for name, value in environment.items() if not name.startswith("MALLOC_")}
    os.environ.update(environment)  # children read it when they start: glibc at exec, torch at import
    context = multiprocessing.get_context("spawn")
    pipes = {}
    for target in (ours, plain):
        pipe, end = context.Pipe()
        context.Process(
            target=target, args=(end, arguments.shards, arguments.config, arguments.overrides), daemon=True
        ).start()
        pipes[target.__name__] = pipe

    console, order, rows = Console(stderr=True), list(pipes), []
    for round_number in range(arguments.rounds + 1):
        order.reverse()
        row: dict[str, float | int | str] = {"round": round_number, "order": " ".join(order)}
        for name in order:
            pipes[name].send(round_number)
            sequences, tokens, seconds = pipes[name].recv()
            row[f"{name}_sequences_per_second"] = round(sequences / seconds, 1)
            row[f"{name}_targets_per_second"] = round(tokens / seconds, 1)
        row["ratio"] = round(float(row["ours_sequences_per_second"]) / float(row["plain_sequences_per_second"]), 3)
        console.print(row)
        if round_number:
            rows.append(row)
    for pipe in pipes.values():
        pipe.send(None)
    result = {
        "command": f"python -m benchmarks.throughput --shards DIR --config {arguments.config} "
        + " ".join([*(["--default-allocator"] if arguments.default_allocator else []), *arguments.overrides]).strip(),
        "allocator": "glibc default" if arguments.default_allocator else "kept (MALLOC_* of worker_environment)",
        "threads": int(os.environ["OMP_NUM_THREADS"]),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "deepspeed")},
        "median_ratio": statistics.median(float(row["ratio"]) for row in rows),
        "rows": rows,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    console.print(
        f"ours / plain PyTorch: {result['median_ratio']:.2f} (median of {len(rows)} rounds) → {arguments.out}"
    )


if __name__ == "__main__":
    main()
