"""What a step spends more, by part, when ranks are added at equal sequences a rank: a table in Markdown.

python -m benchmarks.scaling.growth FILE [--select field=value[,value]]…
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.scaling.grid import select
from benchmarks.scaling.judge import read_results, spec_of

# Columns, and the parts (`breakdown.PARTS`, `measure.WAITING`) that are in them; the last has all the others.
COLUMNS: dict[str, tuple[str, ...]] = {
    "ZeRO": ("ZeRO communication",),
    "ids and rows": ("id exchange",),
    "softmax exchange": ("softmax exchange",),
    "sums": ("sums over ranks",),
    "waiting": ("waiting for the slower rank",),
}
_OWN = "a rank's own work"


def growth(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row for each one of several ranks that has its single rank beside it: milliseconds of both, and of `COLUMNS`
    and `_OWN` how much more there are. Nothing is told of rows that were not profiled.
    """
    profiled = {spec_of(row): row for row in rows if row.get("parts_ms")}
    found = []
    for spec, row in profiled.items():
        single = profiled.get(spec.model_copy(update={"ranks": 1, "batch": spec.batch // spec.ranks}))
        if spec.world_size == 1 or single is None:
            continue
        more = {name: ms - single["parts_ms"][name] for name, ms in row["parts_ms"].items()}
        columns = {column: sum(more.pop(name) for name in names) for column, names in COLUMNS.items()}
        found.append(
            {"cell": spec.cell, "ranks": spec.ranks, "ms": (single["ms_per_step"], row["ms_per_step"])}
            | {"more": columns | {_OWN: sum(more.values())}}
        )
    return found


def markdown(rows: Sequence[Mapping[str, Any]], filters: Sequence[str]) -> str:
    """The table. filters: `field=value[,value]` of cells, as --select of the benchmark."""
    some = growth(rows)
    cells = set(select([one["cell"] for one in some], filters)) if some else set()
    columns = [*COLUMNS, _OWN]
    lines = [
        f"| milliseconds a step | ranks | step | more | {' | '.join(columns)} |",
        f"|---|--:|{'--:|' * (2 + len(columns))}",
    ]
    for one in some:
        if one["cell"] not in cells:
            continue
        before, after = one["ms"]
        numbers = " | ".join(f"{one['more'][column]:+.1f}" for column in columns)
        step = f"{before:.1f} → {after:.1f} | {after - before:+.1f}"
        lines.append(f"| {one['cell'].label} | 1 → {one['ranks']} | {step} | {numbers} |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Growth of a step's parts from one rank to several, in Markdown.")
    parser.add_argument("file", type=Path)
    parser.add_argument("--select", action="append", default=[], metavar="FIELD=A,B")
    given = parser.parse_args()
    print(markdown(read_results(given.file)[0]["rows"], given.select))
