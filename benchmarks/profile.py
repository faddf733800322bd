"""Where a training step's time goes: its multiply-adds, its operations and what kind of them takes the time.

    python -m benchmarks.profile --out benchmarks/results/step_profile.json

Rows are steps of `benchmarks.steps` at n = 50 and batch 256, with and without the softmax. Floating-point operations of
matrix products are counted by torch.utils.flop_counter and do not depend on the machine. It knows no fused attention of
the CPU, so the counted step has attention as plain products, whatever makes the map: all n × n of them, above the
diagonal too. Shares of time are torch.profiler's, of self time on the CPU, of the step as it is.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
from collections import Counter
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch.nn.attention import SDPBackend, sdpa_kernel
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
OTHERS = "pointwise, copies, views"  # what fits none of KINDS
# Patterns of operations' names. Noise takes its logarithm in place; `logsumexp` and `_log_softmax` are losses.
KINDS = {
    "matrix products": ("mm", "addmm", "bmm", "baddbmm"),
    "attention": ("_scaled_dot_product_*", "_softmax", "_softmax_backward_data"),
    "keyed noise": ("bitwise_*", "log_", "cos", "sin", "complex", "ge_"),
    "GELU, norm": ("gelu", "gelu_backward", "native_layer_norm*", "sigmoid*", "tanh*"),
}


def measured(variant: Variant, device: torch.device) -> dict[str, Any]:
    """One row: the mean over the variant's batches."""
    todo = work(variant, device)
    batches = todo.inputs(variant.batch)
    _pass(todo, batches, 0)
    operations = flops(lambda: _pass(todo, batches, 1))
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        _pass(todo, batches, 2)
    time, calls = Counter[str](), 0
    for event in profiled.key_averages():
        if event.key.startswith("aten::"):
            time[kind(event.key.removeprefix("aten::"))] += event.self_cpu_time_total
            calls += event.count
    return {
        "attention": variant.attention,
        "lengths": variant.lengths,
        "softmax": variant.softmax,
        "gigaflops": round(operations / len(batches) / 1e9, 3),
        "operations": round(calls / len(batches)),
        "shares_of_time": {name: round(amount / time.total(), 3) for name, amount in time.most_common()},
    }


def flops(run: Callable[[], object]) -> int:
    """Floating-point operations of the matrix products of `run`, those of attention and of its gradients among them."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops())


def _pass(todo: Work, batches: list[Any], draw: int) -> None:
    for number, batch in enumerate(batches):
        todo.run(batch, draw * len(batches) + number)


def kind(operation: str) -> str:
    """The kind of an operation, named without its `aten::`."""
    return next((kind for kind, names in KINDS.items() if any(fnmatchcase(operation, name) for name in names)), OTHERS)


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
