"""A run's `performance` (of summary.json) for a reader: a small table, and the same facts as text. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text


def performance_table(performance: Mapping[str, Any]) -> Group:
    """Where the time of a step went, and below it the facts."""
    seconds = dict(performance["step_seconds"])
    total = seconds.pop("total")
    table = Table(box=None, pad_edge=False)
    for name in ("one step", *seconds):
        table.add_column(name, justify="right")
    table.add_row(_milliseconds(total), *(_milliseconds(spent) if spent else "–" for spent in seconds.values()))
    table.add_row("", *(f"{spent / total:.0%}" if spent else "" for spent in seconds.values()), style="dim")
    return Group(table, Text(" · ".join(facts(performance).values()), style="dim"))


def facts(performance: Mapping[str, Any]) -> dict[str, str]:
    """What is known, in words, by a short name of each fact."""
    found = {"speed": f"{performance['sequences_per_second']:,.0f} sequences/s, "}
    found["speed"] += f"{performance['tokens_per_second']:,.0f} tokens/s"
    if performance.get("exchange_seconds") is not None:
        spent, share = _milliseconds(performance["exchange_seconds"]), performance["exchange_share"]
        found["exchange"] = f"{spent} of it ({share:.0%}) between ranks"
    for name, sizes in performance["peak_memory_gib"].items():
        ranks = "" if len(sizes) == 1 else f" (largest of {len(sizes)} ranks)"
        found[f"{name} memory"] = f"{name} memory {max(sizes):.2f} GiB{ranks}"
    if performance.get("fraction_of_matmul_peak") is not None:
        share, peak = performance["fraction_of_matmul_peak"], performance["matmul_peak_flops"] / 1e9
        found["matmul"] = f"{share:.1%} of the {peak:,.0f} GFLOP/s of one large {performance['precision']} product"
    return found


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:,.1f} ms"
