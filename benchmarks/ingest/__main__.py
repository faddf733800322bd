"""Ingest from S3 on two cores: `genatt prepare` against one Polars script, and its memory when the log grows.

    python -m benchmarks.ingest --rows 20000000 80000000 --out benchmarks/results/ingest.json

A moto S3 server (same machine, same cores) holds a synthetic log of each size. Both competitors, each in a fresh
process, read its files and write the same number of files to a local directory; they take turns (ours, Polars, Polars,
ours, …), and what they wrote must be equal in content, or the exit status is 1. Seconds do not count imports, of both,
nor Ray's start. Memory is the sum of the PSS of all processes of the competitor. The plot lies beside FILE, as PNG.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import json
import platform
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.ingest.draw import LABELS, draw
from benchmarks.ingest.run import MismatchError, Setting, measure, summary, use_cores

VERSIONS = ("ray", "polars", "pyarrow", "s3fs", "moto")


def main() -> int:
    """Run all turns, write the rows, the plot and the verdict."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[20_000_000, 80_000_000])
    parser.add_argument("--users", type=int, default=200_000)
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--cores", type=int, default=2, help="for everything, the server too")
    parser.add_argument("--rows-per-file", type=int, default=1_250_000, help="of the log")
    parser.add_argument("--rows-per-shard", type=int, default=1_000_000, help="of what is written")
    parser.add_argument("--reference-rows", type=int, help="largest size for the Polars script; default: the smallest")
    parser.add_argument("--object-store-bytes", type=int, help="default: that of `genatt prepare`")
    parser.add_argument("--limit", type=float, default=3600.0, help="seconds a competitor may take")
    parser.add_argument("--workdir", type=Path, help="where results are written and compared; default: the system's")
    parser.add_argument("--profile", action="store_true", help="ours alone, one round: where its time goes")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()

    reference_rows = min(arguments.rows) if arguments.reference_rows is None else arguments.reference_rows
    setting = Setting(
        rows=tuple(sorted(arguments.rows)),
        users=arguments.users,
        items=arguments.items,
        rounds=1 if arguments.profile else arguments.rounds,
        cores=use_cores(arguments.cores),
        rows_per_file=arguments.rows_per_file,
        rows_per_shard=arguments.rows_per_shard,
        reference_rows=0 if arguments.profile else reference_rows,
        object_store_bytes=arguments.object_store_bytes,
        limit=arguments.limit,
        workdir=arguments.workdir,
    )
    console, rows = Console(stderr=True), []
    try:
        for row in measure(setting):
            rows.append(row)
            for name in row["order"].split():
                _show(console, name, row)
    except MismatchError as error:
        console.print(f"the results differ: {error}", style="red", highlight=False)
        return 1

    result = {
        "command": " ".join(["python -m benchmarks.ingest", *sys.argv[1:]]),
        "cores": setting.cores,
        "machine": platform.machine(),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in VERSIONS},
        "users": setting.users,
        "items": setting.items,
        **summary(rows),
        "rows": rows,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(_compact(result))
    draw(rows, arguments.out.with_suffix(".png"))
    for name, judged in result["verdict"].items():
        word = "met" if judged["met"] else "missed"
        console.print(f"{name}: {judged['value']} (target ≤ {judged['target']}): {word}", highlight=False)
    return 0


def _compact(result: dict[str, Any]) -> str:
    """As JSON, a memory line in one line."""
    text = json.dumps(result | {"rows": []}, indent=2)
    rows = ",\n".join("    " + json.dumps(row) for row in result["rows"])
    return text.replace('"rows": []', f'"rows": [\n{rows}\n  ]') + "\n"


def _show(console: Console, name: str, row: dict[str, Any]) -> None:
    turn = row[name]
    title = f"{LABELS[name]}, {row['rows']:,} rows, round {row['round']}: {turn['seconds']:.2f} s"
    table = Table(title=title, title_justify="left")
    for heading in ("step", "seconds", "of", "memory peak, MiB", "of", "CPU seconds"):
        table.add_column(heading, justify="left" if heading in ("step", "of") else "right")
    steps = [(step, f"{seconds:.2f}") for step, seconds in turn["steps"].items()]
    peaks = [
        (role, f"{size / 2**20:,.0f}") for role, size in {"all": turn["peak_bytes"], **turn["peak_by_role"]}.items()
    ]
    used = [(role, f"{seconds:.1f}") for role, seconds in turn.get("cpu_seconds", {}).items()]
    for cells in itertools.zip_longest(steps, peaks, used, fillvalue=("", "")):
        table.add_row(*itertools.chain(*cells))
    console.print(table)
    told = (
        f"S3: {turn['s3_requests']:,.0f} requests, {turn['s3_bytes'] / 1e6:,.0f} MB, {turn['s3_cpu_seconds']:.1f} CPU s"
    )
    if "ray_start_seconds" in turn:
        told += f"; Ray's start {turn['ray_start_seconds']:.2f} s; spilled {(turn['spilled_bytes'] or 0) / 1e6:,.0f} MB"
    console.print(told, highlight=False)


if __name__ == "__main__":
    sys.exit(main())
