"""Figures of the steps benchmark (`genatt bench steps`): time and its ratio to dot product against T and S."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from genatt_dist.evaluation.plots import Plot
from genatt_dist.evaluation.report_data import COLOURS, finite, pretty

Row = Mapping[str, Any]

# The forms of one attention are shades of its colour in the other figures.
_COLOURS = {
    ("dot_product", None): COLOURS["dot_product"],
    ("variational", "factor"): COLOURS["variational"],
    ("variational", "matrix"): "#e8b481",
    ("diffusion", "factor"): COLOURS["diffusion"],
    ("diffusion", "matrix"): "#85c9b0",
}
_LEAST_POINTS = 3
_DASHES = {"unrolled": "dash", "all": "dash"}  # the costlier way to do the same
_NAMES = {"dot_product": "dot product", "variational": "V-GenAtt", "diffusion": "D-GenAtt"}
_LAWS = {"all_n": "histories of length n", "beauty": "Beauty's lengths"}

_VALUES: Mapping[str, Callable[[Any], bool]] = {
    "mode": lambda value: value in ("training", "serving"),
    "lengths": lambda value: value in list(_LAWS),
    "sampler": lambda value: value is None or isinstance(value, str),
    "sample_blocks": lambda value: value in (None, "last", "all"),
    "steps": lambda value: value is None or _is_count(value),
    "max_len": lambda value: _is_count(value),
    "batch": lambda value: _is_count(value),
    "blocks": lambda value: _is_count(value),
    "softmax": lambda value: isinstance(value, bool),
    "status": lambda value: isinstance(value, str),
    "ms_per_step": lambda value: value is None or finite(value),
    "ratio_to_dot_product": lambda value: value is None or finite(value),
}


def wrong_field(row: Row) -> str | None:
    """A field that keeps the row from being drawn, absent or of another benchmark; None where all are well."""
    if [row.get("attention"), row.get("form")] not in [list(way) for way in _COLOURS]:
        return "attention"
    return next((name for name, fits in _VALUES.items() if name not in row or not fits(row[name])), None)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def steps_plots(rows: Sequence[Row]) -> list[Plot]:
    """One figure for each quantity, max_len and way to measure that there are rows of: training first.

    Times are drawn where the catalogue takes part and all histories are of length n, ratios everywhere, and nothing
    where there are fewer than three numbers of steps: that is no curve. Both axes are logarithmic. Open markers are
    rows too long to be repeated; what ran out of memory has no point.
    """
    groups: dict[tuple[Any, ...], dict[int, list[Row]]] = {}
    for row in rows:
        way = (row["mode"], row["lengths"], row["batch"] == 1, row["blocks"], row["softmax"])
        groups.setdefault(way, {}).setdefault(row["max_len"], []).append(row)
    figures = []
    for (_, law, _, _, softmax), by_max_len in groups.items():
        if len(_counts(by_max_len[min(by_max_len)])) < _LEAST_POINTS:
            continue
        for quantity in ("ms_per_step", "ratio_to_dot_product"):
            if quantity == "ratio_to_dot_product" or (softmax and law == "all_n"):
                figures += [_figure(quantity, by_max_len[max_len]) for max_len in sorted(by_max_len)]
    return [figure for figure in figures if figure.traces]


def _figure(quantity: str, rows: Sequence[Row]) -> Plot:
    first, ratio = rows[0], quantity == "ratio_to_dot_product"
    training = first["mode"] == "training"
    unit, steps = ("a step", "T") if training else ("a request" if first["batch"] == 1 else "a batch", "S")
    what = f"Time over dot product's, {first['mode']}" if ratio else f"Milliseconds {unit}, {first['mode']}"
    parts = [f"n = {first['max_len']}", _LAWS[first["lengths"]], "one user" if first["batch"] == 1 else None]
    parts += [None if training else f"{first['blocks']} block{'s' if first['blocks'] > 1 else ''}"]
    parts += [f"with{'' if first['softmax'] else 'out'} the {'softmax' if training else 'ranking'}"]
    reading = (
        f"Batch of {first['batch']:,}. "
        + ("1 is dot product in the same rounds. " if ratio else "")
        + ("Unrolled training pays for every one of its T steps, one_step for one. " if training else "")
        + "Levels take no steps; an open marker was timed once only."
    )
    counts = _counts(rows)
    layout = {
        "xaxis": {"title": {"text": steps}, "type": "log", "tickvals": counts, "ticktext": [str(n) for n in counts]},
        "yaxis": {"title": {"text": "ratio" if ratio else "ms"}, "type": "log"},
        "hovermode": "closest",
    }
    title = f"{what}: {', '.join(part for part in parts if part)}"
    return Plot(title, reading, _traces(quantity, rows, counts), layout)


def _counts(rows: Sequence[Row]) -> list[int]:
    """The numbers of steps there are rows of."""
    return sorted({row["steps"] for row in rows if row["steps"] is not None})


def _traces(quantity: str, rows: Sequence[Row], counts: Sequence[int]) -> list[dict[str, Any]]:
    """A line for each attention, form and sampler; a level where nothing is denoised."""
    lines: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if row[quantity] is not None:
            place = row["sample_blocks"] if row["blocks"] > 1 else None
            lines.setdefault((row["attention"], row["form"], row["sampler"], place), []).append(row)
    traces = []
    for (attention, form, sampler, place), members in lines.items():
        points = sorted((row["steps"], row[quantity], row["status"]) for row in members if row["steps"] is not None)
        if not points:
            level = members[0]
            points = [(count, level[quantity], level["status"]) for count in counts]
        place_text = {"last": "last block samples", "all": "all blocks sample", None: None}[place]
        name = [_NAMES[attention], form, sampler if sampler != "ddim" else None, place_text]
        levels = members[0]["steps"] is None
        traces.append(
            {
                "type": "scatter",
                "mode": "lines" if levels else "lines+markers",
                "name": pretty(", ".join(part for part in name if part)),
                "x": [point[0] for point in points],
                "y": [point[1] for point in points],
                "line": {
                    "color": _COLOURS[attention, form],
                    "width": 2,
                    "dash": "dot" if levels else _DASHES.get(place or sampler, "solid"),
                },
                "marker": {"size": 6, "symbol": ["circle" if point[2] == "ok" else "circle-open" for point in points]},
                "hovertemplate": "%{x}: %{y:.4g}",
            }
        )
    return traces
