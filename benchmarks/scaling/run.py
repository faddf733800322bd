"""`genatt bench scaling`: the grid measured, the model fitted and held against the rest, written, drawn, summed up."""

from __future__ import annotations

import importlib.metadata
import math
import os
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from benchmarks.scaling.grid import NOTHING, ScalingConfig, Spec
from benchmarks.scaling.judge import TARGET, TOGETHER, judged, modelled, read_model, read_results
from benchmarks.scaling.measure import measured_cell
from benchmarks.scaling.pool import Pool, RowError
from benchmarks.steps.measure import write
from data_pipeline.errors import GenattError

if TYPE_CHECKING:
    from benchmarks.scaling.model import Model

_COLLECTIVE_REPEATS = 30
_VERSIONS = ("torch", "torchrec", "deepspeed", "ray", "numpy", "genatt-dist")


def run(
    config: ScalingConfig, out: Path, trace: Path | None, console: Console, model: Path | None = None
) -> dict[str, Any]:
    """Measure, write `out` after every cell and the PNGs beside it at the end; returns what was written.

    trace: a directory for a chrome trace of every row, on the host of rank 0. model: results whose model is held
    against these rows, instead of one that is fitted to some of them. Raises GenattError for a word that names nothing,
    a file that cannot be written or read, or workers that do not come, before anything is measured; and at the end
    where not one row was.
    """
    _check_name(out)
    cells = config.cells
    other = (model.name, read_model(model, config)) if model else None
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
    return finish(result, config, out, console, other)


def again(measured: Path, out: Path, console: Console, model: Path | None = None) -> dict[str, Any]:
    """Everything that follows from the rows of a file, made again: nothing is measured. model: as of `run`."""
    _check_name(out)
    result, config = read_results(measured)
    return finish(result, config, out, console, (model.name, read_model(model, config)) if model else None)


def _check_name(out: Path) -> None:
    if out.suffix.lower() == ".png":
        raise GenattError(f"--out {out}: rows are JSON, and figures get that name: choose {out.with_suffix('.json')}")


def finish(
    result: dict[str, Any],
    config: ScalingConfig,
    out: Path,
    console: Console,
    other: tuple[str, Model] | None = None,
) -> dict[str, Any]:
    """Fit, judge, extrapolate, write, draw and print what was measured. other: a model that is not fitted to it.

    Raises GenattError where no row was measured.
    """
    from benchmarks.scaling.draw import draw
    from benchmarks.scaling.extrapolate import extrapolated

    rows = result.pop("rows")
    result["model"] = modelled(rows, result["collectives"], config, other)
    result["weak_scaling"] = judged(rows)
    result["extrapolation"] = extrapolated(config.max_len, config.width)
    result["rows"] = rows
    write(result, out)
    drawn = draw(result, out)
    show(result, out, drawn, console)
    if all(row["status"] != "ok" for row in rows):
        raise GenattError(
            f"{out}: none of {len(rows)} rows was measured ({_counts(rows)}), the first: {rows[0]['note']}: raise "
            "--memory-mb or --row-seconds, or measure less"
        )
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
            words.append(f"{option} {','.join(map(str, value)) or NOTHING if isinstance(value, tuple) else value}")
    return " ".join([*words, "--out FILE"])


def show(result: Mapping[str, Any], out: Path, drawn: Sequence[Path], console: Console) -> None:
    """Weak scaling, the model's errors, and where everything is."""
    table = Table("weak scaling", "efficiency", "of the machine's ceiling", "by the model", f"≥ {TARGET:.0%}")
    for one in result["weak_scaling"]:
        numbers = [f"{one[name] or math.nan:.1%}" for name in ("found", "of_ceiling", "by_model")]
        table.add_row(one["what"], *numbers, "met" if one["met"] else "missed")
    if result["weak_scaling"]:
        console.print(table)
    model = result["model"]
    if "note" in model:
        console.print(f"cost model {model['note']}", highlight=False, soft_wrap=True)
    for split, errors in model.get("errors", {}).items():
        _say(console, f"cost model, rows {split}", errors, model["tolerance"])
    several = model.get("errors", {}).get(TOGETHER, {})
    if "null_model" in several:
        _say(console, "the same rows by what one rank takes", several["null_model"], model["tolerance"])
        weak = several["weak_efficiency"]
        console.print(
            f"cost model, weak efficiency: ≥ {weak['target']:.0%} in {weak['met_by_model']} of {weak['cells']} cells, "
            f"measured in {weak['met_as_measured']}; too fast in {several['too_fast']} of {several['rows']} rows of "
            f"several ranks, {several['bias']:+.1%} on average",
            highlight=False,
            soft_wrap=True,
        )
    figures = f"; figures: {', '.join(map(str, drawn))}" if drawn else ""
    rows = result["rows"]
    console.print(f"{out}: {len(rows)} rows ({_counts(rows)}){figures}", highlight=False, soft_wrap=True)


def _say(console: Console, what: str, errors: Mapping[str, Any], tolerance: float) -> None:
    console.print(
        f"{what}: {errors['within_tolerance']} of {errors['rows']} within {tolerance:.0%}, median error "
        f"{errors['median']:.1%}, largest {errors['largest']:.1%}",
        highlight=False,
        soft_wrap=True,
    )


def _counts(rows: Sequence[Mapping[str, Any]]) -> str:
    return ", ".join(f"{count} {name}" for name, count in Counter(row["status"] for row in rows).items())
