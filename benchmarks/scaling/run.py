"""`genatt bench scaling`: the grid measured, the model fitted and held against the rest, written, drawn, summed up."""

from __future__ import annotations

import importlib.metadata
import math
import os
import platform
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from benchmarks.scaling.grid import ScalingConfig, Spec, held_out
from benchmarks.scaling.measure import measured_cell
from benchmarks.scaling.pool import Pool, RowError
from benchmarks.steps.measure import write
from data_pipeline.errors import GenattError

TARGET = 0.95
_COLLECTIVE_REPEATS = 30
_VERSIONS = ("torch", "torchrec", "deepspeed", "ray", "numpy", "genatt-dist")


def run(config: ScalingConfig, out: Path, trace: Path | None, console: Console) -> dict[str, Any]:
    """Measure, write `out` after every cell and the PNGs beside it at the end; returns what was written.

    trace: a directory for a chrome trace of every row, on the host of rank 0. Raises GenattError for a word that names
    nothing, a file that cannot be written, or workers that do not come, before anything is measured.
    """
    if out.suffix.lower() == ".png":
        raise GenattError(f"--out {out}: rows are JSON, and figures get that name: choose {out.with_suffix('.json')}")
    cells = config.cells
    result: dict[str, Any] = {
        "command": command(config),
        "config": config.model_dump(mode="json"),
        "machine": {"architecture": platform.machine(), "cores": os.cpu_count(), "python": platform.python_version()},
        "versions": {name: importlib.metadata.version(name) for name in _VERSIONS},
        "threads_a_rank": 1,
        "placement": "rank i of a host on its core i, nothing else there that the benchmark started and that runs",
        "rows": [],
    }
    write(result, out)
    total = sum(len(config.rows(cell)) for cell in cells)
    bar = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*bar, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("starting workers", total=total)
        try:
            pool = Pool(config.launcher, max(config.ranks), config.row_seconds, config.start_seconds)
        except RowError as error:
            raise GenattError(error.note) from None
        with pool:
            result["ranks_of_hosts"] = pool.hosts
            progress.update(task, description="collectives")
            result["collectives"] = collectives(pool, config)

            def tell(spec: Spec) -> None:
                progress.update(task, description=spec.label)

            for cell in cells:
                rows = measured_cell(pool, config, cell, trace, tell)
                result["rows"] += rows
                progress.advance(task, len(rows))
                write(result, out)
                if not console.is_terminal:  # a job's log has no bar
                    console.print(f"{progress.tasks[task].completed:.0f} of {total} rows: {cell.label}", soft_wrap=True)
    return finish(result, config, out, console)


def finish(result: dict[str, Any], config: ScalingConfig, out: Path, console: Console) -> dict[str, Any]:
    """Fit, judge, extrapolate, write, draw and print what was measured."""
    from benchmarks.scaling.draw import draw
    from benchmarks.scaling.extrapolate import extrapolated

    rows = result.pop("rows")
    result["model"] = modelled(rows, result["collectives"], config)
    result["weak_scaling"] = judged(rows)
    result["extrapolation"] = extrapolated(config.max_len, config.width)
    result["rows"] = rows
    write(result, out)
    drawn = draw(result, out)
    show(result, out, drawn, console)
    return result


def collectives(pool: Pool, config: ScalingConfig) -> dict[str, list[dict[str, Any]]]:
    """Timings of the collectives, by number of ranks."""
    from benchmarks.scaling.collectives import SIZES

    found = {}
    for ranks in config.ranks:
        if ranks > 1:
            with pool.row(Spec(ranks=ranks, batch=ranks)) as row:
                answers = row.ask("collectives", sizes=list(SIZES), repeats=_COLLECTIVE_REPEATS)
            found[str(ranks)] = answers[0]["rows"]
    return found


def modelled(
    rows: Sequence[dict[str, Any]], timed: Mapping[str, Sequence[Mapping[str, Any]]], config: ScalingConfig
) -> dict[str, Any]:
    """Fit the model to the rows it may see, and add to each measured row what it says of it: `split`, `model_ms`,
    `model_error`. Returns what was fitted and how well held-out rows were met; a note where rows to fit to are missing.
    """
    from benchmarks.scaling import features
    from benchmarks.scaling.model import TOLERANCE, Model

    measured = [(Spec(**{name: row[name] for name in Spec.model_fields}), row) for row in rows if row["ms_per_step"]]
    for spec, row in measured:
        row["split"] = "held out" if held_out(spec, config.batch) else "fitted"
    amounts: dict[int, list[Any]] = {}
    seconds: dict[int, list[float]] = {}
    works = {spec: features.work(spec) for spec, _ in measured}
    for spec, row in measured:
        if row["split"] == "fitted":
            amounts.setdefault(spec.ranks, []).append(works[spec].amounts)
            seconds.setdefault(spec.ranks, []).append(row["ms_per_step"] / 1e3)
    if set(amounts) != set(config.ranks):
        return {"note": "not fitted: the rows it is fitted to were not measured (see `held_out` in grid.py)"}
    model = Model.fit(amounts, seconds, {int(ranks): some for ranks, some in timed.items()})
    for spec, row in measured:
        parts = {"computing": model.computing(works[spec].amounts, spec.ranks)}
        if spec.world_size > 1:
            parts |= works[spec].exchanged(model.links[spec.world_size])
        row["model_ms"] = float(f"{1e3 * sum(parts.values()):.4g}")
        row["model_error"] = round(row["model_ms"] / row["ms_per_step"] - 1, 4)
    errors = {
        split: [abs(row["model_error"]) for _, row in measured if row["split"] == split]
        for split in ("fitted", "held out")
    }
    return {
        "seconds_of_one": {
            str(busy): dict(zip(features.NAMES, map(float, weights), strict=True))
            for busy, weights in model.weights.items()
        },
        "alpha_beta": {
            str(ranks): {kind: {"alpha": line.alpha, "beta": line.beta} for kind, line in link.lines.items()}
            for ranks, link in model.links.items()
        },
        "errors": {
            split: {
                "rows": len(found),
                "median": round(statistics.median(found), 4),
                "largest": round(max(found), 4),
                "within_tolerance": sum(error <= TOLERANCE for error in found),
            }
            for split, found in errors.items()
            if found
        },
        "tolerance": TOLERANCE,
        "met": bool(errors["held out"]) and max(errors["held out"]) <= TOLERANCE,
    }


def judged(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Weak scaling of each cell from one rank, against the target and against processes that share nothing."""
    found = []
    for row in rows:
        if row["ranks"] == 1 or row["independent"] or row.get("weak_efficiency") is None:
            continue
        spec = Spec(**{name: row[name] for name in Spec.model_fields})
        found.append(
            {
                "what": f"{spec.cell.label}, 1 to {spec.ranks} ranks, {spec.batch // spec.ranks} sequences a rank",
                "target": TARGET,
                "found": row["weak_efficiency"],
                "of_ceiling": row.get("of_ceiling"),
                "met": row["weak_efficiency"] >= TARGET,
            }
        )
    return found


def command(config: ScalingConfig) -> str:
    """What measures the same again."""
    default, words = ScalingConfig(), ["genatt bench scaling"]
    for name, value in config.model_dump().items():
        if value == getattr(default, name):
            continue
        option = "--" + name.replace("_", "-")
        if name == "select":
            words += [f"{option} {one}" for one in value]
        else:
            words.append(f"{option} {','.join(map(str, value)) if isinstance(value, tuple) else value}")
    return " ".join([*words, "--out FILE"])


def show(result: Mapping[str, Any], out: Path, drawn: Sequence[Path], console: Console) -> None:
    """Weak scaling, the model's errors, and where everything is."""
    table = Table("weak scaling", "efficiency", "of the machine's ceiling", f"≥ {TARGET:.0%}", title_justify="left")
    for one in result["weak_scaling"]:
        ceiling = one["of_ceiling"] or math.nan
        table.add_row(one["what"], f"{one['found']:.1%}", f"{ceiling:.1%}", "met" if one["met"] else "missed")
    console.print(table)
    model = result["model"]
    if "note" in model:
        console.print(f"cost model {model['note']}", highlight=False, soft_wrap=True)
    for split, errors in model.get("errors", {}).items():
        console.print(
            f"cost model, rows {split}: {errors['within_tolerance']} of {errors['rows']} within "
            f"{model['tolerance']:.0%}, median error {errors['median']:.1%}, largest {errors['largest']:.1%}",
            highlight=False,
        )
    counts = ", ".join(f"{count} {name}" for name, count in Counter(row["status"] for row in result["rows"]).items())
    figures = ", ".join(str(path) for path in drawn)
    console.print(f"{out}: {len(result['rows'])} rows ({counts}); figures: {figures}", highlight=False, soft_wrap=True)
