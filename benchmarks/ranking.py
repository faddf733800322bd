"""Exact ranking over a sharded table: time and peak memory of a rank against users and items.

    python -m benchmarks.ranking --items 1000000 4000000 --out benchmarks/results/ranking.json

Each rank holds its block of rows (random, fp32) and ranks its users in batches, as evaluation does: exact ranks, the
best 20, seen items left out, and what the lists hold counted. `peak_mb` is by how much a rank's resident memory rose
over what it held with its rows before the first batch; `users_times_items_mb` is what all scores would take.

Legend: B users of a batch, V rows of a rank, D width, S seen pairs.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import multiprocessing
import os
import platform
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from rich.console import Console

SEEN, MIB = 50, 1 << 20


def work(pipe: Connection, rank: int, ranks: int, meeting: str, grid: list[dict[str, int]]) -> None:
    """One rank: a row of results for each setting."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=ranks)
    for setting in grid:
        dist.barrier()
        pipe.send(measure(setting, rank, ranks))
    dist.destroy_process_group()


def measure(setting: dict[str, int], rank: int, ranks: int) -> dict[str, float]:
    """Rank setting["users"] users of this rank. Collective."""
    import numpy as np
    import torch
    import torch.distributed as dist

    from genatt_dist.embedding.rank_exchange import rank_over_ranks
    from genatt_dist.embedding.ranking import Query
    from genatt_dist.evaluation.diversity import Lists
    from genatt_dist.evaluation.metrics import CUTOFFS, metrics
    from genatt_dist.training.engine import sum_over_ranks

    items, width, users, batch = (setting[name] for name in ("items", "width", "users", "batch_users"))
    block = -(-items // ranks)
    low, high = min(items, rank * block), min(items, (rank + 1) * block)
    generator = torch.Generator().manual_seed(rank)
    rows_VD = torch.randn(high - low, width, generator=generator)
    dist.barrier()
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets the peak to what is resident now
    started = time.perf_counter()
    lists = Lists(np.ones(items + 1, np.int64), None, torch.device("cpu"))
    found = []
    for first in range(0, users, batch):
        size = min(batch, users - first)
        query = Query(
            states_BD=torch.randn(size, width, generator=generator),
            seen_row_S=torch.arange(size).repeat_interleave(SEEN),
            seen_item_S=torch.randint(1, items + 1, (size * SEEN,), generator=generator),
            target_B=torch.randint(1, items + 1, (size,), generator=generator),
        )
        ranking = rank_over_ranks(query, rows_VD, 1 + low, max(CUTOFFS), setting["chunk_items"])
        lists.add(ranking.top_Bk)
        found.append(ranking.ahead_B + 1)
    ranked = time.perf_counter() - started
    shown = lists.shown(sum_over_ranks)
    accuracy = metrics(torch.cat(found).numpy(), shown)
    values = accuracy | lists.metrics(accuracy, shown, sum_over_ranks)
    return {
        "rank_seconds": ranked,
        "metrics_seconds": time.perf_counter() - started - ranked,
        "peak_mb": (_status("VmHWM") - before) / MIB,
        "table_mb": rows_VD.nbytes / MIB,
        "coverage@20": values["coverage@20"],
    }


def _status(field: str) -> int:
    """A line of this process's status, in bytes."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) << 10


def grid_of(arguments: argparse.Namespace) -> list[dict[str, int]]:
    """Users rise at the smallest catalogue, items at the fewest users. The first setting comes twice: it warms up."""
    fixed = {name: getattr(arguments, name) for name in ("width", "batch_users", "chunk_items")}
    items, users = sorted(arguments.items), sorted(arguments.users)
    pairs = [(items[0], count) for count in users] + [(count, users[0]) for count in items[1:]]
    return [{"items": size, "users": count, **fixed} for size, count in [pairs[0], *pairs]]


def main() -> None:
    """Measure the grid on all ranks and write a row for each setting."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, nargs="+", default=[1_000_000, 4_000_000])
    parser.add_argument("--users", type=int, nargs="+", default=[256, 1024, 4096], help="of each rank")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--batch-users", type=int, default=256)
    parser.add_argument("--chunk-items", type=int, default=65_536)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()

    grid = grid_of(arguments)
    console, rows = Console(stderr=True), []
    os.environ["OMP_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = [], []
        for rank in range(arguments.ranks):
            pipe, end = context.Pipe()
            told = (end, rank, arguments.ranks, str(Path(folder) / "meeting"), grid)
            processes.append(context.Process(target=work, args=told, daemon=True))
            processes[-1].start()
            end.close()
            pipes.append(pipe)
        for number, setting in enumerate(grid):
            answers = [pipe.recv() for pipe in pipes]
            row: dict[str, Any] = {**setting, **{name: round(max(a[name] for a in answers), 3) for name in answers[0]}}
            scores = arguments.ranks * setting["users"] * setting["items"] * 4
            row["users_times_items_mb"] = round(scores / MIB, 1)
            row["users_per_second"] = round(arguments.ranks * setting["users"] / row["rank_seconds"], 1)
            console.print(row)
            rows += [row] if number else []
        for process in processes:
            process.join()
    result = {
        "command": "python -m benchmarks.ranking "
        f"--items {' '.join(map(str, arguments.items))} --users {' '.join(map(str, arguments.users))} "
        f"--ranks {arguments.ranks} --width {arguments.width} --batch-users {arguments.batch_users} "
        f"--chunk-items {arguments.chunk_items}",
        "threads_per_rank": 1,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": importlib.metadata.version("torch"),
        "rows": rows,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
