"""The plot of the ingest benchmark: memory over time for every size, and the seconds of both competitors by step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

STYLES = ("-", "--", ":", "-.")
COLORS = {"ours": "#1f6feb", "polars": "#d1672a"}
LABELS = {"ours": "genatt prepare", "polars": "Polars script"}


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draws the first round of every size at `path` (PNG)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    first = [row for row in rows if row["round"] == 1]
    figure = Figure(figsize=(12, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    memory, times = figure.subplots(1, 2)
    bars: list[tuple[str, Mapping[str, Any]]] = []
    for row, style in zip(first, (style for _ in first for style in STYLES), strict=False):
        for name, color in COLORS.items():
            if name in row:
                label = f"{LABELS[name]}, {row['rows'] / 1e6:g}M rows"
                seconds, size = zip(*row[name]["line"], strict=True)
                memory.plot(seconds, [each / 1024 for each in size], style, color=color, linewidth=1.6, label=label)
                bars.append((label, row[name]))
    memory.set_xlabel("seconds since the start of the process")
    memory.set_ylabel("PSS of all its processes, GiB")
    memory.set_ylim(bottom=0)
    memory.legend(fontsize=8)
    memory.grid(alpha=0.25)

    shades: dict[str, str] = {"Ray's start": "#d0d0d0", "rest": "#303030"}
    for place, (_, turn) in enumerate(bars):
        left = 0.0
        steps = {"Ray's start": turn.get("ray_start_seconds", 0.0), **turn["steps"]}
        steps["rest"] = max(0.0, turn["seconds"] - sum(turn["steps"].values()))
        for step, seconds in steps.items():
            entry = step if step not in shades or not place else None  # of the legend: each step once
            color = shades.setdefault(step, f"C{len(shades) - 2}")
            times.barh(place, seconds, left=left, color=color, edgecolor="white", label=entry)
            left += seconds
    times.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    times.set_yticks(range(len(bars)), [label for label, _ in bars], fontsize=8)
    times.invert_yaxis()
    times.set_xlabel("seconds")
    figure.savefig(path, dpi=100)
