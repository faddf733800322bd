"""Where a training step's time goes: its multiply-adds, its operations and what kind of them takes the time.

    python -m benchmarks.profile --out benchmarks/results/step_profile.json

Rows are steps of `benchmarks.steps` at n = 50 and batch 256, with and without the softmax. Floating-point operations of
matrix products and attention are counted by torch.utils.flop_counter and do not depend on the machine; shares of time
are torch.profiler's, of self time on the CPU.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.steps.grid import Variant
from benchmarks.steps.work import Work, work

BATCH = 256
VARIANTS: tuple[dict[str, Any], ...] = (
    {"attention": "dot_product"},
    {"attention": "variational", "form": "factor"},
    {"attention": "diffusion", "form": "factor", "sampler": "one_step", "steps": 50},
)
# By how an operation's name begins; what fits none is pointwise or moves data.
KINDS = {
    "matrix products": ("mm", "addmm", "bmm", "baddbmm"),
    "attention": ("_scaled_dot_product", "_softmax"),
    "keyed noise": ("bitwise", "log", "cos", "sin", "complex", "ge_"),
    "GELU, norm": ("gelu", "native_layer_norm", "sigmoid", "tanh"),
}


def measured(variant: Variant, device: torch.device) -> dict[str, Any]:
    """One row: the mean over the variant's batches."""
    todo = work(variant, device)
    batches = todo.inputs(BATCH)
    _pass(todo, batches, 0)
    with FlopCounterMode(display=False) as counter:
        _pass(todo, batches, 1)
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        _pass(todo, batches, 2)
    time, calls = Counter[str](), 0
    for event in profiled.key_averages():
        if event.key.startswith("aten::"):
            time[_kind(event.key.removeprefix("aten::"))] += event.self_cpu_time_total
            calls += event.count
    return {
        "attention": variant.attention,
        "lengths": variant.lengths,
        "softmax": variant.softmax,
        "gigaflops": round(counter.get_total_flops() / len(batches) / 1e9, 3),
        "operations": round(calls / len(batches)),
        "shares_of_time": {kind: round(amount / time.total(), 3) for kind, amount in time.most_common()},
    }


def _pass(todo: Work, batches: list[Any], draw: int) -> None:
    for number, batch in enumerate(batches):
        todo.run(batch, draw * len(batches) + number)


def _kind(operation: str) -> str:
    return next((kind for kind, names in KINDS.items() if operation.startswith(names)), "pointwise, copies, views")


def main() -> None:
    """Profile every variant and write the rows, each with its ratio of operations to dot product."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    out, device, console = parser.parse_args().out, torch.device("cpu"), Console(stderr=True)
    rows: list[dict[str, Any]] = []
    for softmax in (True, False):
        for lengths in ("all_n", "beauty"):
            cell = [
                measured(Variant("training", **given, batch=BATCH, lengths=lengths, softmax=softmax), device)
                for given in VARIANTS
            ]
            for row in cell:
                row["gigaflops_ratio"] = round(row["gigaflops"] / cell[0]["gigaflops"], 3)
                row["operations_ratio"] = round(row["operations"] / cell[0]["operations"], 3)
                console.print(row)
            rows += cell
    result = {
        "command": "python -m benchmarks.profile --out FILE",
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {"torch": importlib.metadata.version("torch")},
        "rows": rows,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
