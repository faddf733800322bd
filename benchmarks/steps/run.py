"""`genatt bench steps`: the words of the command line made into a grid, measured, drawn and summed up."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.steps import targets
from benchmarks.steps.draw import draw
from benchmarks.steps.grid import QUICK, Grid, select
from benchmarks.steps.measure import Row, Settings, measure
from data_pipeline.errors import GenattError


def run(
    out: Path,
    quick: bool,
    filters: Sequence[str],
    extents: Mapping[str, str],
    batches: Mapping[str, int | None],
    careful: Mapping[str, Any],
    console: Console,
) -> None:
    """Measure and write `out` and the PNG beside it.

    extents: comma-separated numbers by field of Grid, empty for the grid's own; batches likewise, None for its own;
    careful: fields of Settings. Raises GenattError for a word that names nothing, before anything is measured.
    """
    if out.suffix.lower() == ".png":
        raise GenattError(f"--out {out}: rows are JSON, and figures get that name: choose {out.with_suffix('.json')}")
    given: dict[str, Any] = {name: _numbers(name, text) for name, text in extents.items() if text}
    given |= {name: size for name, size in batches.items() if size is not None}
    variants = select(replace(QUICK if quick else Grid(), **given).variants(), filters)
    settings = Settings(**careful)
    rows = measure(variants, settings, out, _command(quick, filters, given, settings), console)
    drawn = draw(rows, out.with_suffix(".png"))
    _print(rows, targets.judge(rows, settings.num_items), out, drawn, console)


def _numbers(name: str, text: str) -> tuple[int, ...]:
    option = "--" + {"max_lens": "max_len"}.get(name, name).replace("_", "-")
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and int(word) >= 1 for word in words):
        raise GenattError(f"{option} {text}: give whole numbers from 1 with commas, for example 1,10,50")
    return tuple(sorted({int(word) for word in words}))


def _command(quick: bool, filters: Sequence[str], given: Mapping[str, Any], settings: Settings) -> str:
    """What measures the same again."""
    words = ["genatt bench steps", *(["--quick"] if quick else []), *(f"--select {text}" for text in filters)]
    options = {"max_lens": "max_len", "num_items": "items", "memory_mb": "memory_limit"}
    default, chosen = vars(Settings()), vars(settings)
    changed = dict(given) | {name: value for name, value in chosen.items() if value != default[name]}
    for name, value in changed.items():
        text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        words.append(f"--{options.get(name, name).replace('_', '-')} {text}")
    return " ".join([*words, "--out FILE"])


def _print(rows: Sequence[Row], judged: Sequence[Mapping[str, Any]], out: Path, drawn: bool, console: Console) -> None:
    if judged:
        table = Table("target", "at most", "measured", "", title="Time over dot product's, or as named")
        for one in judged:
            table.add_row(
                one["what"], f"{one['bound']:.2f}", f"{one['measured']:.2f}", "met" if one["met"] else "missed"
            )
        console.print(table)
    counts = ", ".join(f"{count} {status}" for status, count in Counter(row["status"] for row in rows).items())
    figures = f"; figures: {out.with_suffix('.png')}" if drawn else ""
    console.print(f"{out}: {len(rows)} rows ({counts}){figures}", highlight=False, soft_wrap=True)
