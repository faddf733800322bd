"""The figures of the HTML report as one PNG: the same plots, drawn by matplotlib, which needs no browser."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from genatt_dist.evaluation.plots import Plot
from genatt_dist.evaluation.steps_plots import steps_plots

_STYLES = {"solid": "-", "dash": "--", "dot": ":"}


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> bool:
    """Draw the rows' figures at `path`, one column for each max_len. False where there is nothing to draw."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    plots = steps_plots(rows)
    if not plots:
        return False
    columns = max(2, len({row["max_len"] for row in rows}))
    lines = -(-len(plots) // columns)
    figure = Figure(figsize=(5.2 * columns, 4.1 * lines), layout="constrained")
    FigureCanvasAgg(figure)
    for index, plot in enumerate(plots):
        _panel(figure.add_subplot(lines, columns, index + 1), plot)
    figure.savefig(path, dpi=90)
    return True


def _panel(axes: Any, plot: Plot) -> None:
    from matplotlib.ticker import FormatStrFormatter, LogLocator

    for trace in plot.traces:
        line = trace["line"]
        axes.plot(
            trace["x"], trace["y"], _STYLES[line["dash"]], color=line["color"], linewidth=1.6, label=trace["name"]
        )
        if "markers" in trace["mode"]:
            faces = ["none" if symbol.endswith("open") else line["color"] for symbol in trace["marker"]["symbol"]]
            axes.scatter(trace["x"], trace["y"], s=18, facecolors=faces, edgecolors=line["color"], zorder=3)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(plot.layout["xaxis"]["tickvals"], plot.layout["xaxis"]["ticktext"], minor=False)
    axes.minorticks_off()
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    axes.set_xlabel(plot.layout["xaxis"]["title"]["text"])
    axes.set_ylabel(plot.layout["yaxis"]["title"]["text"])
    axes.set_title("\n".join(textwrap.wrap(plot.title, 52)), fontsize=9)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=6)
