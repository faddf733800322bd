"""What a large table costs: step time, memory and creation of sharded tables from 10 thousand to 50 million rows.

    python -m benchmarks.tables --out benchmarks/results/tables.json

Each size has two ranks of its own (gloo, one thread each), which make the table and train the product's step on
histories in memory; all groups live at once and take turns, so that a ratio compares steps of the same minutes. The
batch, the negatives and the law of the ids are the same for all (`benchmarks/table_rank.py` states them). Memory is the
kernel's peak of resident bytes of a rank; its growth over the smallest size is divided by what the rank holds of the
table: rows and optimizer state. A size `50000000:fp16` has rows of that precision. The plot lies beside FILE, as PNG.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import select
import socket
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.table_rank import Work, argument
from genatt_dist.launch.launchers import worker_environment

VERSIONS = ("torch", "torchrec", "deepspeed")
# The largest fp32 table: its step over that of the smallest, and a rank's growth over what it holds of the table.
TIME_TARGET, MEMORY_TARGET = 1.2, 1.2
RANKS = 2


class Group:
    """The ranks of one size, as processes that wait for their turn."""

    def __init__(self, work: Work, limit: float) -> None:
        self.work, self._limit = work, limit
        self.made: list[dict[str, Any]] = []
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self._ranks = []
        for rank in range(RANKS):
            own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": RANKS, "LOCAL_WORLD_SIZE": RANKS}
            address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1, "DS_ACCELERATOR": "cpu"}
            environment = dict(os.environ) | {name: str(value) for name, value in (own | address).items()}
            self._ranks.append(
                subprocess.Popen(
                    [sys.executable, "-m", "benchmarks.table_rank", argument(work)],
                    env=worker_environment(environment, RANKS),
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL if not os.environ.get("BENCHMARK_STDERR") else None,
                    text=True,
                )
            )

    def answers(self) -> list[dict[str, Any]]:
        """The next line of every rank."""
        found = []
        for process in self._ranks:
            assert process.stdout is not None
            ready, _, _ = select.select([process.stdout], [], [], self._limit)
            line = process.stdout.readline() if ready else ""
            if not line:
                what = "ended" if ready else f"said nothing for {self._limit:.0f} s"
                raise SystemExit(
                    f"a rank of {self.work.rows:,} rows {what}: run again with BENCHMARK_STDERR=1 to see why"
                )
            found.append(json.loads(line))
        return found

    def steps(self, count: int) -> list[dict[str, Any]]:
        """Let the ranks take `count` steps."""
        for process in self._ranks:
            assert process.stdin is not None
            process.stdin.write(f"steps {count}\n")
            process.stdin.flush()
        return self.answers()

    def close(self) -> None:
        """End the processes."""
        for process in self._ranks:
            process.kill()
            process.wait()


def measure(works: Sequence[Work], rounds: int, steps: int, warmup: int, limit: float) -> list[dict[str, Any]]:
    """A row for each size: how its table was made, and its steps in every round."""
    with ExitStack() as stack:
        groups = []
        for work in works:  # one after the other: creation is timed alone
            groups.append(Group(work, limit))
            stack.callback(groups[-1].close)
            groups[-1].made = groups[-1].answers()
            print(
                f"{work.rows:,} rows: made in {max(one['seconds'] for one in groups[-1].made):.1f} s", file=sys.stderr
            )
            groups[-1].steps(warmup)
        turns: list[list[float]] = [[] for _ in groups]
        last: list[list[dict[str, Any]]] = [[] for _ in groups]
        for number in range(rounds):
            order = range(len(groups)) if number % 2 == 0 else range(len(groups) - 1, -1, -1)
            for index in order:
                last[index] = groups[index].steps(steps)
                turns[index].append(
                    statistics.median(max(pair) for pair in zip(*(one["seconds"] for one in last[index]), strict=True))
                )
        return [
            {
                "rows": group.work.rows,
                "precision": group.work.precision,
                "creation_seconds": max(one["seconds"] for one in group.made),
                "made": group.made,
                "step_seconds": turn,
                "loss": answers[0]["loss"],
                "peak_bytes": [one["memory"]["peak"] for one in answers],
            }
            for group, turn, answers in zip(groups, turns, last, strict=True)
        ]


def compare(rows: list[dict[str, Any]]) -> None:
    """Add to each row its ratios to the smallest size: `time_ratio` (median over rounds), `memory_ratio` of the rank
    that grew most, and `creation_ratio`, of its peak while the table was made over what was there before.
    """
    base = rows[0]
    for row in rows:
        row["time_ratio"] = statistics.median(
            mine / theirs for mine, theirs in zip(row["step_seconds"], base["step_seconds"], strict=True)
        )
        held = [one["row_bytes"] + one["state_bytes"] for one in row["made"]]
        grown = [mine - theirs for mine, theirs in zip(row["peak_bytes"], base["peak_bytes"], strict=True)]
        row["held_bytes"], row["grown_bytes"] = held, grown
        row["memory_ratio"] = max(more / size for more, size in zip(grown, held, strict=True))
        row["creation_ratio"] = max(
            (one["after"]["peak"] - one["before"]["now"]) / size for one, size in zip(row["made"], held, strict=True)
        )


def targets(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The verdicts on the largest fp32 table."""
    row = max((row for row in rows if row["precision"] == "fp32"), key=lambda row: row["rows"])
    return [
        {"target": name, "rows": row["rows"], "limit": limit, "found": round(row[name], 3), "met": row[name] <= limit}
        for name, limit in (("time_ratio", TIME_TARGET), ("memory_ratio", MEMORY_TARGET))
    ]


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """The plot: median step by rows, and what a rank holds and grew by."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    times, sizes = figure.subplots(1, 2)
    labels = [f"{row['rows'] / 1e6:g}M {row['precision']}" for row in rows]
    medians = [1000 * statistics.median(row["step_seconds"]) for row in rows]
    times.bar(labels, medians, color="#1f6feb")
    times.axhline(medians[0] * TIME_TARGET, color="#d1672a", linestyle="--", label=f"{TIME_TARGET} × the smallest")
    times.set_ylabel("milliseconds a step, median")
    times.legend()
    place = range(len(rows))
    held = [max(row["held_bytes"]) / 2**30 for row in rows]
    sizes.bar([each - 0.2 for each in place], held, 0.4, label="held: rows and optimizer state", color="#1f6feb")
    sizes.bar(
        [each + 0.2 for each in place],
        [max(row["grown_bytes"]) / 2**30 for row in rows],
        0.4,
        label="peak memory above the smallest",
        color="#d1672a",
    )
    sizes.set_xticks(list(place), labels)
    sizes.set_ylabel("GiB a rank")
    sizes.legend()
    figure.savefig(path, dpi=100)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write the rows and the plot, say the verdicts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = ["10000", "1000000", "10000000", "50000000:fp16"]
    parser.add_argument("--rows", nargs="+", default=sizes, help="items, smallest first, with `:precision` if not fp32")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--optimizer", default="rowwise_adagrad")
    parser.add_argument("--batch", type=int, default=256, help="sequences of a global batch")
    parser.add_argument("--length", type=int, default=50, help="of every history")
    parser.add_argument("--negatives", type=int, default=1024)
    parser.add_argument("--users", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=10, help="of a turn")
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--limit", type=float, default=900.0, help="seconds a rank may be silent")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)

    works = []
    for size in options.rows:
        number, _, precision = size.partition(":")
        works.append(
            Work(
                rows=int(number),
                width=options.width,
                precision=precision or "fp32",
                optimizer=options.optimizer,
                batch_sequences=options.batch,
                length=options.length,
                negatives=options.negatives,
                users=options.users,
            )
        )
    rows = measure(works, options.rounds, options.steps, options.warmup, options.limit)
    compare(rows)
    verdicts = targets(rows)
    result = {
        "command": " ".join(["python -m benchmarks.tables", *(sys.argv[1:] if arguments is None else arguments)]),
        "machine": platform.machine(),
        "ranks": RANKS,
        "threads_a_rank": 1,
        "ids": "p(id) ∝ 1/rank over the catalogue, ranks scattered over the ids; uniform negatives",
        "versions": {name: importlib.metadata.version(name) for name in VERSIONS},
        "targets": verdicts,
        "rows": rows,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    draw(rows, options.out.with_suffix(".png"))
    for row in rows:
        print(
            f"{row['rows']:>12,} {row['precision']}: {1000 * statistics.median(row['step_seconds']):.1f} ms a step "
            f"({row['time_ratio']:.2f}×), a rank holds {max(row['held_bytes']) / 2**20:,.0f} MiB and grew by "
            f"{row['memory_ratio']:.2f}× of it, made in {row['creation_seconds']:.1f} s "
            f"(peak {row['creation_ratio']:.2f}×)"
        )
    for one in verdicts:
        print(f"{one['target']} {one['found']} ≤ {one['limit']}: {'met' if one['met'] else 'NOT met'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
