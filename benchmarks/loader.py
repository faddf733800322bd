"""What the loader costs: how much faster than the trainer it is, and how long the trainer waits for it.

    python -m benchmarks.loader --shards shards/ml-1m --moto --out benchmarks/results/loader_ml-1m.json

Dot-product training on one process. For each max_len, `--rounds` times in turns:
- the trainer: one epoch, and the share of its time that it waits for the next batch;
- the loader alone: the same epoch of batches, nothing done with them.
Settings: `kept` (the defaults: shards that fit into data.prefetch_bytes are read once, in the first epoch) and
`streamed` (for ml-1m: three shuffle buffers, of which one is kept or read ahead, so that every epoch reads again, as
with a data set that is larger than memory). The figures to quote are the medians of tokens per second, and the share of
all rounds' time that the trainer waited. With --moto the shards are uploaded to a local S3 server first, whose work
takes place on the same cores.
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
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from rich.console import Console

from genatt_dist import config as configuration
from genatt_dist.launch.launchers import single_process, worker_environment

CONFIG = "configs/beauty_dot_product.yaml"
BUCKET = "shards"
STREAMED = ["data.shuffle_windows=2048", "data.prefetch_bytes=1500000"]
SETTINGS: dict[str, list[str]] = {"kept": [], "streamed": STREAMED}


def measure(pipe: Connection, shards: str, config: str, overrides: list[str], rounds: int) -> None:
    """The rows of one setting, one a round."""
    import torch.distributed as dist

    from genatt_dist.training.engine import init_process_group, select_device
    from genatt_dist.training.timing import SectionTimer
    from genatt_dist.training.trainer import Trainer

    resolved = configuration.load(config, [*overrides, f"data.path={shards}"])
    device = select_device()
    init_process_group(device)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(Path(folder), resolved, device, "process", resume=False)
        trainer.learner.set_training()
        for number in range(rounds):
            row: dict[str, Any] = {"round": number}
            for what in ("trainer", "loader"):  # first the one that may have to wait
                tokens, started = 0, time.perf_counter()
                timer = SectionTimer(device)
                for batch in timer.waiting(trainer.batches.iterate(number, 0, 0, 1, device)):
                    if what == "trainer":
                        trainer.update([batch], 1.0)
                    tokens += batch.num_tokens
                seconds = time.perf_counter() - started
                row[f"{what}_seconds"] = round(seconds, 3)
                row[f"{what}_tokens_per_second"] = round(tokens / seconds, 1)
                if what == "trainer":
                    waited = timer.take()["input"]
                    row["waited_seconds"] = round(waited, 4)
                    row["input_stall"] = round(waited / seconds, 5)
            row["ratio"] = round(row["loader_tokens_per_second"] / row["trainer_tokens_per_second"], 2)
            pipe.send(row)
    pipe.send(None)
    dist.destroy_process_group()


@contextmanager
def uploaded(shards: Path) -> Iterator[str]:
    """The URL of a copy of `shards` in a bucket of a local S3 server; the environment says where it is."""
    import boto3

    from benchmarks.ingest.server import S3Server

    with S3Server() as server:
        os.environ.update(server.environment)
        client = boto3.client("s3", endpoint_url=server.url)
        client.create_bucket(Bucket=BUCKET)
        for file in sorted(path for path in shards.rglob("*") if path.is_file()):
            client.upload_file(str(file), BUCKET, f"{shards.name}/{file.relative_to(shards)}")
        yield f"s3://{BUCKET}/{shards.name}"


def rows_of(shards: str, arguments: argparse.Namespace, console: Console) -> list[dict[str, Any]]:
    """Every setting in a process of its own."""
    context, rows = multiprocessing.get_context("spawn"), []
    for max_len in arguments.max_len:
        for setting, changes in SETTINGS.items():
            pipe, end = context.Pipe()
            overrides = [f"data.max_len={max_len}", *changes, *arguments.overrides]
            child = context.Process(
                target=measure, args=(end, shards, arguments.config, overrides, arguments.rounds), daemon=True
            )
            child.start()
            end.close()  # so that a child that dies ends the wait
            for row in iter(pipe.recv, None):
                rows.append({"max_len": max_len, "setting": setting, **row})
                console.print(rows[-1])
            child.join()
    return rows


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each setting: medians of the rounds' ratios and rates, and the share of waiting in all rounds and in
    the first, which reads everything.
    """
    kept = []
    for max_len, setting in dict.fromkeys((row["max_len"], row["setting"]) for row in rows):
        these = [row for row in rows if (row["max_len"], row["setting"]) == (max_len, setting)]
        medians = {
            name: statistics.median(row[name] for row in these)
            for name in ("loader_tokens_per_second", "trainer_tokens_per_second", "ratio")
        }
        stall = sum(row["waited_seconds"] for row in these) / sum(row["trainer_seconds"] for row in these)
        first = these[0]["input_stall"]
        kept.append(
            {"max_len": max_len, "setting": setting, **medians, "input_stall": round(stall, 5), "first_epoch": first}
        )
    return kept


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", required=True, help="what `genatt prepare` published: a directory or a URL")
    parser.add_argument("--moto", action="store_true", help="serve the (local) shards from a local S3 server")
    parser.add_argument("--config", default=CONFIG)
    parser.add_argument("--max-len", type=int, nargs="+", default=[50, 200])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("overrides", nargs="*", help="section.key=value")
    arguments = parser.parse_args()

    os.environ.update(worker_environment({}, 1) | single_process())  # children read it when they start
    console = Console(stderr=True)
    if arguments.moto:
        with uploaded(Path(arguments.shards).resolve()) as url:
            rows = rows_of(url, arguments, console)
    else:
        rows = rows_of(arguments.shards, arguments, console)
    flags = ["--moto"] if arguments.moto else []
    result = {
        "command": " ".join(
            ["python -m benchmarks.loader --shards DIR --config", arguments.config, *flags, *arguments.overrides]
        ),
        "storage": "local S3 server (moto) on the same cores" if arguments.moto else "as --shards says",
        "settings": SETTINGS,
        "threads": int(os.environ["OMP_NUM_THREADS"]),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "numpy", "pyarrow", "s3fs")},
        "summary": summary(rows),
        "rows": rows,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    for row in summary(rows):
        console.print(row)
    console.print(f"→ {arguments.out}")


if __name__ == "__main__":
    main()
