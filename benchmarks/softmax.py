"""The full softmax in chunks against the one that holds all logits: time, and memory with the table on one rank or on
several.

    python -m benchmarks.softmax --out benchmarks/results/softmax.json

For each catalogue size one process times forward and backward of both in turns (ours, unchunked, unchunked, ours, …),
as far as the unchunked one fits into memory, and compares their gradients. The ratio to quote is the median over
rounds. Memory is that of a process of its own for each case: the peak of its resident pages above what it held with the
table in place, less the table's gradient, which any way of training has; on a GPU the allocator's peak. `sharded` is a
whole update of a table that TorchRec has cut over ranks: lookup, scores of the global batch's targets, exchange, one
Adagrad step; its ranks' figures are added up. The plot lies beside FILE, as PNG.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib.metadata
import json
import multiprocessing
import os
import platform
import resource
import socket
import statistics
import sys
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console

from genatt_dist.launch.launchers import worker_environment
from genatt_dist.launch.limits import available_memory

TIME_TARGET = 1.4
MEMORY_TARGET = 1 / 20
VERSIONS = ("torch", "torchrec", "fbgemm-gpu-cpu")
_LIMIT = 1800.0  # seconds for one process
_UNCHUNKED_COPIES = 7.0  # logits, log-probabilities, gradients of both, and what an allocator that keeps buffers holds


def timed(pipe: Connection, items: int, tokens: int, width: int, rounds: int) -> None:
    """Seconds of ours and of the unchunked loss by round, and how far apart their gradients are."""
    import torch
    from torch.nn import functional as F

    from genatt_dist.loss.full import default_chunk, full_loss
    from genatt_dist.training.engine import select_device

    device = select_device()
    table, states, targets = _case(torch, items, tokens, width, device)
    weight, chunk = torch.ones(tokens, device=device), default_chunk(items + 1, device.type)

    def ours() -> Any:
        return full_loss(states, table, targets, weight, chunk, 1)

    def unchunked() -> Any:
        return F.cross_entropy(states @ table[1:].T, targets - 1, reduction="sum")

    free = torch.cuda.mem_get_info()[0] if device.type == "cuda" else _free()
    fits = _UNCHUNKED_COPIES * 4 * items * tokens < free
    ways = {"ours": ours, "unchunked": unchunked} if fits else {"ours": ours}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    gradients: dict[str, Any] = {}
    for number in range(-1, rounds):  # the first warms up
        for name in ways if number % 2 else reversed(ways):
            table.grad = states.grad = None
            _wait(torch, device)
            began = time.perf_counter()
            ways[name]().backward()
            _wait(torch, device)
            if number >= 0:
                seconds[name].append(round(time.perf_counter() - began, 5))
            else:
                gradients[name] = (states.grad.clone(), table.grad[:: max(1, items // 4096)].clone())
    row: dict[str, Any] = {"items": items, "chunk": chunk, **{f"{name}_seconds": seconds[name] for name in ways}}
    if fits:
        pairs = zip(gradients["ours"], gradients["unchunked"], strict=True)
        row["ratio"] = round(statistics.median(a / b for a, b in zip(*seconds.values(), strict=True)), 3)
        row["gradient_error"] = max(float((one - other).abs().max() / other.abs().max()) for one, other in pairs)
    pipe.send(row)


def whole(pipe: Connection, items: int, tokens: int, width: int) -> None:
    """Bytes beyond table and gradient that the loss of a replicated table takes."""
    import torch

    from genatt_dist.loss.full import default_chunk, full_loss
    from genatt_dist.training.engine import select_device

    device = select_device()
    _warm_up(torch, device)
    table, states, targets = _case(torch, items, tokens, width, device)
    weight, chunk = torch.ones(tokens, device=device), default_chunk(items + 1, device.type)
    before = _settled(torch, device)
    full_loss(states, table, targets, weight, chunk, 1).backward()
    assert table.grad is not None
    pipe.send(_peak(torch, device) - before - 4 * table.numel())


def sharded(pipe: Connection, items: int, tokens: int, width: int) -> None:
    """Bytes beyond this rank's rows, their gradient and optimizer state that a whole update takes, and its seconds."""
    import torch
    import torch.distributed as dist

    from genatt_dist.config import TableConfig
    from genatt_dist.embedding.sharded import ShardedTable
    from genatt_dist.embedding.summed import SummedUpdate
    from genatt_dist.loss.full import default_chunk, full_loss
    from genatt_dist.training.engine import init_process_group, select_device

    device = select_device()
    init_process_group(device)
    _warm_up(torch, device)
    config = TableConfig(kind="sharded")
    table = ShardedTable(items, width, config, 0.1, 0, device)
    summed, world_size = SummedUpdate(table, config), dist.get_world_size()
    catalogue, draw = summed.catalogue, torch.Generator().manual_seed(dist.get_rank())
    ids = torch.randint(1, items + 1, (2, tokens // world_size), generator=draw).to(device)
    weight, chunk = torch.ones(tokens // world_size, device=device), default_chunk(catalogue.most_rows, device.type)
    before, began = _settled(torch, device), time.perf_counter()
    states = summed.lookup(ids[0])
    loss = full_loss(states, catalogue.rows_VD, ids[1], weight, chunk, catalogue.padding, catalogue.first_row)
    loss.backward()
    summed.update()
    _wait(torch, device)
    seconds = time.perf_counter() - began
    pipe.send((_peak(torch, device) - before - 4 * catalogue.rows_VD.numel(), round(seconds, 4)))
    dist.destroy_process_group()


def _case(torch: Any, items: int, tokens: int, width: int, device: Any) -> tuple[Any, Any, Any]:
    """A table (row 0 is padding), states of the tokens, their targets."""
    draw = torch.Generator().manual_seed(0)
    table = torch.randn(items + 1, width, generator=draw).mul_(0.1).to(device).requires_grad_()
    states = torch.randn(tokens, width, generator=draw).to(device).requires_grad_()
    return table, states, torch.randint(1, items + 1, (tokens,), generator=draw).to(device)


def _warm_up(torch: Any, device: Any) -> None:
    """Threads, libraries and their buffers, which are not the loss's."""
    from genatt_dist.loss.full import full_loss

    table, states, targets = _case(torch, 1000, 256, 64, device)
    full_loss(states, table, targets, torch.ones(256, device=device), 64, 1).backward()


def _wait(torch: Any, device: Any) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _settled(torch: Any, device: Any) -> int:
    """Bytes in use now, from which the peak counts; free pages go back to the system first, or would hide it."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return int(torch.cuda.memory_allocated())
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets the peak
    return int(psutil.Process().memory_info().rss)


def _peak(torch: Any, device: Any) -> int:
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _free() -> int:
    return min(psutil.virtual_memory().available, available_memory())


def in_processes(function: Any, world_size: int, *arguments: Any) -> list[Any]:
    """What `function` sends from each of `world_size` fresh processes, by rank."""
    context = multiprocessing.get_context("spawn")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
    before, started = dict(os.environ), []
    try:
        for rank in range(world_size):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
            os.environ.update(worker_environment(before, world_size) | address | place)
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=function, args=(sender, *arguments), daemon=True)
            process.start()
            sender.close()
            started.append((process, receiver))
    finally:
        os.environ.clear()
        os.environ.update(before)
    answers = []
    try:
        for process, receiver in started:
            if not receiver.poll(_LIMIT):
                raise TimeoutError(f"{function.__name__} {arguments} took more than {_LIMIT:.0f} s")
            answers.append(receiver.recv())
            process.join(60)
    finally:
        for process, _ in started:
            process.kill()
    return answers


def measure(items: int, tokens: int, width: int, rounds: int, world_size: int) -> dict[str, Any]:
    """The row of one catalogue size."""
    (row,) = in_processes(timed, 1, items, tokens, width, rounds)
    logits = 4 * items * tokens
    (alone,) = in_processes(whole, 1, items, tokens, width)
    parts = in_processes(sharded, world_size, items, tokens, width)
    apart = sum(beyond for beyond, _ in parts)
    return row | {
        "logits_bytes": logits,
        "replicated_bytes": alone,
        "replicated_share": round(alone / logits, 5),
        "sharded_bytes": [beyond for beyond, _ in parts],
        "sharded_share": round(apart / logits, 5),
        "sharded_update_seconds": max(seconds for _, seconds in parts),
    }


def verdict(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Time where both fit, memory at the largest size."""
    largest = max(rows, key=lambda row: row["items"])
    both = max((row for row in rows if "ratio" in row), key=lambda row: row["items"], default=None)
    judged = {}
    if both:
        judged[f"time at {both['items']:,} items"] = (both["ratio"], TIME_TARGET)
    for kind in ("replicated", "sharded"):
        judged[f"{kind} memory at {largest['items']:,} items"] = (largest[f"{kind}_share"], MEMORY_TARGET)
    return {
        name: {"value": value, "target": target, "met": value <= target} for name, (value, target) in judged.items()
    }


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Seconds and bytes over the catalogue's size (PNG)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    times, memory = figure.subplots(1, 2)
    for name, color in (("ours", "#1f6feb"), ("unchunked", "#d1672a")):
        points = [(row["items"], statistics.median(row[f"{name}_seconds"])) for row in rows if f"{name}_seconds" in row]
        times.plot(*zip(*points, strict=True), "o-", color=color, label="in chunks" if name == "ours" else "all logits")
    sizes = [row["items"] for row in rows]
    memory.plot(sizes, [row["logits_bytes"] / 2**20 for row in rows], "o-", color="#d1672a", label="the logits")
    target = [row["logits_bytes"] * MEMORY_TARGET / 2**20 for row in rows]
    memory.plot(sizes, target, "--", color="#999999", label="target: a twentieth of them")
    for key, label, style in (("replicated_share", "one rank", "o-"), ("sharded_share", "sharded, all ranks", "s:")):
        taken = [row[key] * row["logits_bytes"] / 2**20 for row in rows]
        memory.plot(sizes, taken, style, color="#1f6feb", label=label)
    times.set_ylabel("seconds, forward and backward")
    memory.set_ylabel("MiB beyond table, gradient, optimizer state")
    for axes in (times, memory):
        axes.set_xscale("log"), axes.set_yscale("log"), axes.set_xlabel("items"), axes.legend(), axes.grid(alpha=0.25)
    figure.savefig(path, dpi=100)


def main() -> int:
    """Measure all sizes, write the rows, the plot and the verdict."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, nargs="+", default=[10_000, 100_000, 300_000, 600_000, 1_000_000])
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    console, rows = Console(stderr=True), []
    for items in sorted(arguments.items):
        row = measure(items, arguments.tokens, arguments.width, arguments.rounds, arguments.ranks)
        rows.append(row)
        console.print(
            f"{items:,} items: time ratio {row.get('ratio', '— (all logits do not fit)')}, memory "
            f"{row['replicated_share']:.4f} of the logits, sharded {row['sharded_share']:.4f}",
            highlight=False,
        )
    shown = [word if word != str(arguments.out) else "FILE" for word in sys.argv[1:]]
    result = {
        "command": " ".join(["python -m benchmarks.softmax", *shown]),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in VERSIONS},
        "tokens": arguments.tokens,
        "width": arguments.width,
        "ranks": arguments.ranks,
        "verdict": verdict(rows),
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result | {"rows": rows}, indent=2) + "\n")
    draw(rows, arguments.out.with_suffix(".png"))
    for name, judged in result["verdict"].items():
        word = "met" if judged["met"] else "missed"
        console.print(f"{name}: {judged['value']} (target ≤ {judged['target']}): {word}", highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
