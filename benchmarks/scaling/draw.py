"""The figures: throughput, efficiency, where a step goes, and the model against what was measured and beyond it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import wrap
from typing import Any

from benchmarks.scaling.breakdown import PARTS
from benchmarks.scaling.extrapolate import MARK
from benchmarks.scaling.judge import ALONE, FITTED, TOGETHER, spec_of
from benchmarks.scaling.measure import WAITING

Row = Mapping[str, Any]
_BLUE, _ORANGE, _GREY = "#1f6feb", "#d1672a", "#888888"
_DASHES = {"replicated": "-", "sharded": "--"}
_WIDTH = 6.0


def draw(result: Mapping[str, Any], out: Path) -> list[Path]:
    """The PNGs beside `out`, of which there are rows."""
    rows = [row for row in result["rows"] if row["ms_per_step"]]
    drawn = []
    for name, picture, wanted in (
        ("throughput", _throughput, rows),
        ("breakdown", _breakdown, [row for row in rows if row.get("parts_ms") and _is_weak(row)]),
        ("model", _model, [row for row in rows if "model_ms" in row]),
    ):
        if wanted:
            drawn.append(out.with_name(f"{out.stem}_{name}.png"))
            picture(wanted, result, drawn[-1])
    return drawn


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _is_weak(row: Row) -> bool:
    """Whether it is one rank, or compared with one rank, under weak scaling."""
    return not row["independent"] and (row["ranks"] == 1 or row.get("weak_efficiency") is not None)


def _place(row: Row) -> str:
    return "dot" if row["steps"] is None else str(row["steps"])


def _throughput(rows: Sequence[Row], result: Mapping[str, Any], path: Path) -> None:
    """A column for each catalogue and loss: tokens a second above, efficiency below, against T."""
    batch, weak = result["config"]["batch"], [row for row in rows if _is_weak(row)]
    columns = sorted({(row["loss"] == "full", row["items"]) for row in weak})
    places = sorted(
        {_place(row) for row in weak}, key=lambda place: (place != "dot", place if place == "dot" else int(place))
    )
    figure = _figure(max(2, len(columns)) * 3.6, 7)
    axes = figure.subplots(2, len(columns), squeeze=False)
    for column, (full, items) in enumerate(columns):
        above, below = axes[0][column], axes[1][column]
        here = [row for row in weak if (row["loss"] == "full", row["items"]) == (full, items)]
        for table, dash in _DASHES.items():
            for ranks in sorted({row["ranks"] for row in here}):
                some = [
                    row for row in here if (row["table"], row["ranks"], row["batch"]) == (table, ranks, batch * ranks)
                ]
                some.sort(key=lambda row: places.index(_place(row)))
                at = [places.index(_place(row)) for row in some]
                colour = _BLUE if ranks == 1 else _ORANGE
                name = f"{ranks} rank{'s' if ranks > 1 else ''}, {table}"
                above.plot(at, [row["tokens_per_second"] for row in some], dash + "o", color=colour, ms=4, label=name)
                if ranks > 1:
                    efficiency = [row["weak_efficiency"] for row in some]
                    below.plot(at, efficiency, dash + "o", color=_ORANGE, ms=4, label=f"weak, {ranks} ranks, {table}")
                    ceiling = [
                        row["weak_efficiency"] / row["of_ceiling"] if row["of_ceiling"] else None for row in some
                    ]
                    below.plot(at, ceiling, dash, color=_GREY, label=f"ceiling: processes that share nothing, {table}")
        below.axhline(0.95, color="black", linewidth=0.8, linestyle=":")
        above.set_title(f"{items:,} items, {'full' if full else 'sampled'} softmax", fontsize=9)
        above.set_ylim(bottom=0)
        below.set_ylim(0, 1.15)
        for each in (above, below):
            each.set_xticks(range(len(places)), places)
            each.set_xlabel("T (dot: dot product)")
            each.grid(alpha=0.25)
    axes[0][0].set_ylabel("tokens a second")
    axes[1][0].set_ylabel("weak efficiency")
    axes[0][0].legend(fontsize=6)
    axes[1][0].legend(fontsize=6, loc="lower left")
    figure.savefig(path, dpi=90)


def _breakdown(rows: Sequence[Row], result: Mapping[str, Any], path: Path) -> None:
    """A stacked bar for each row under weak scaling."""
    batch = result["config"]["batch"]
    some = [row for row in rows if row["batch"] == batch * row["ranks"]]
    if any(row["steps"] == 50 for row in some):  # T alone changes nothing here; the JSON has them all
        some = [row for row in some if row["steps"] in (None, 50)]
    names = [name for name in (*PARTS, WAITING) if any(row["parts_ms"].get(name, 0) > 0 for row in some)]
    figure = _figure(9, 1.6 + 0.3 * len(some))
    axes = figure.subplots()
    left = [0.0] * len(some)
    from matplotlib import colormaps

    for index, name in enumerate(names):
        values = [row["parts_ms"].get(name, 0.0) for row in some]
        axes.barh(range(len(some)), values, left=left, label=name, color=colormaps["tab20"](index))
        left = [start + value for start, value in zip(left, values, strict=True)]
    axes.set_yticks(
        range(len(some)), [f"{spec_of(row).cell.label}, {row['ranks']} rank(s)" for row in some], fontsize=7
    )
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds a step: shares by torch.profiler, of steps that are not profiled")
    figure.legend(fontsize=7, loc="outside lower center", ncols=5)
    figure.savefig(path, dpi=90)


def _model(rows: Sequence[Row], result: Mapping[str, Any], path: Path) -> None:
    """Left: measured rows. Middle: weak efficiency of each cell. Right: clusters, which nobody measured."""
    figure = _figure(2.8 * _WIDTH, 4.6)
    held, weak, beyond = figure.subplots(1, 3)
    for split, marker, colour in ((FITTED, "o", _BLUE), (ALONE, "^", _GREY), (TOGETHER, "s", _ORANGE)):
        some = [row for row in rows if row["split"] == split]
        at = [row["ms_per_step"] for row in some], [row["model_ms"] for row in some]
        held.scatter(*at, s=16, marker=marker, color=colour, label=f"{split}: {len(some)} rows")
    ends = [min(row["ms_per_step"] for row in rows), max(row["ms_per_step"] for row in rows)]
    held.plot(ends, ends, color="black", linewidth=0.8)
    for factor in (0.85, 1.15):
        held.plot(ends, [factor * end for end in ends], color="black", linewidth=0.6, linestyle=":")
    held.set(xscale="log", yscale="log", xlabel="measured, milliseconds a step", ylabel="model, milliseconds a step")
    held.set_title("Model against rows of this machine (dotted: 15 %)", fontsize=9)
    held.legend(fontsize=7)
    pairs = [(row["weak_efficiency"], row["model_weak_efficiency"]) for row in rows if row.get("model_weak_efficiency")]
    weak.scatter([found for found, _ in pairs], [model for _, model in pairs], s=16, marker="s", color=_ORANGE)
    within = [
        0.98 * min((min(pair) for pair in pairs), default=0.8),
        1.02 * max((max(pair) for pair in pairs), default=1),
    ]
    weak.plot(within, within, color="black", linewidth=0.8)
    weak.set(xlim=within, ylim=within, xlabel="measured", ylabel="model")
    weak.set_title(f"Weak efficiency: model against {len(pairs)} cells of this machine", fontsize=9)
    weak.grid(alpha=0.25)
    extrapolation = result["extrapolation"]
    curves: dict[tuple[str, str], list[Row]] = {}
    for row in extrapolation["rows"]:
        curves.setdefault((row["attention"], row["table"]), []).append(row)
    for (attention, table), some in curves.items():
        name = {"dot_product": "dot product", "diffusion": "D-GenAtt"}[attention]
        colour = _BLUE if attention == "dot_product" else _ORANGE
        ranks = [row["ranks"] for row in some]
        beyond.plot(
            ranks, [row["weak_efficiency"] for row in some], _DASHES[table], color=colour, label=f"{name}, {table}"
        )
    beyond.set_xscale("log", base=2)
    beyond.set_ylim(0, 1.1)
    beyond.set(xlabel="GPUs", ylabel="weak efficiency over one GPU")
    beyond.set_title("\n".join(wrap(f"{MARK}: {extrapolation['what']}", 70)), fontsize=8)
    beyond.text(0.5, 0.5, MARK, transform=beyond.transAxes, ha="center", color=_GREY, fontsize=16, alpha=0.5)
    beyond.legend(fontsize=7)
    figure.savefig(path, dpi=90)
