"""The figures of a report, as plotly's JSON: losses, metrics, diagnostics, throughput."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from genatt_dist.evaluation.report_data import ACCURACY, HEADLINE, Model, finite, metric_order, pretty

DASHES = ("solid", "dash", "dot", "dashdot")  # one a block
MOST_POINTS = 400  # of one line: more are not visible and only make the page heavy

# Per-block diagnostics in the trainer's log → title and how to read it. Others are drawn under their own name.
DIAGNOSTICS = {
    "attention_entropy": (
        "Attention entropy, relative to uniform",
        "1 is attention spread evenly over the history (over-smoothing), 0 is one position alone.",
    ),
    "total_variation": (
        "Total variation between two maps of one history",
        "How far two samples of the generated map lie apart: near 0 the generator has become deterministic.",
    ),
    "between_users": (
        "Share of the maps' variance between users",
        "1 is no noise, near 0 the map is the same noise for everybody; the rest lies between samples of one user.",
    ),
    "kappa": ("Sharpness κ of the generated logits", "Rising means rows of the map get more peaked; mean over heads."),
    "residual_scale": ("Residual scale ς", "Size of what diffusion adds to the mean map; near 0 it adds nothing."),
    "alpha": (
        "Weight α of the dot product beside the generated map",
        "Learned from 0; how much a hybrid leans on its deterministic part.",
    ),
    "kl_mean": ("KL per latent dimension (nat)", "Near 0 the latent carries nothing: posterior collapse."),
    "active_units": (
        "Active latent units",
        "Latent dimensions that depend on the input; few means it is not used.",
    ),
    "alpha_bar_T": (
        "Signal left at the end of diffusion, ᾱ_T",
        "Fixed by the schedule; sampling starts from pure noise, so it must be near 0.",
    ),
}


@dataclass
class Plot:
    """A figure with its heading and one sentence on how to read it. traces and layout are plotly's JSON."""

    title: str
    reading: str
    traces: list[dict[str, Any]]
    layout: dict[str, Any]


def plots(models: Sequence[Model]) -> list[Plot]:
    """Every plot there are numbers for."""
    drawn = (*_training(models), *_diagnostics(models), _dimensions(models), *_results(models))
    return [plot for plot in drawn if plot.traces]


def _training(models: Sequence[Model]) -> Iterable[Plot]:
    for key, title, reading in (
        ("loss", "Training loss", "Recommendation loss at each logged step; flat means more epochs would not help."),
        (
            "generative_loss",
            "Generative loss",
            "What the map's generator is trained on besides ranking; weights differ, so compare its course between "
            "models, not its height.",
        ),
    ):
        lines = [(model, *_thin(*model.series("train", "step", key))) for model in models]
        traces = [_line(model, x, y) for model, x, y in lines if any(y)]
        yield Plot(title, reading, traces, _axes("step", key.replace("_", " ")))

    traces = [_line(model, *model.series("valid", "epoch", HEADLINE), markers=True) for model in models]
    traces = [trace for trace in traces if trace["y"]]
    layout = _axes("epoch", pretty(HEADLINE), zero=True)
    for model in models:  # popularity learns nothing: a level, not a curve
        if traces and not model.train and finite(level := model.valid.get(HEADLINE)):
            epochs = [x for trace in traces for x in trace["x"]]
            ends = [min(epochs), max(epochs)]
            traces.append(_line(model, ends, [level, level], dash="dash"))
    yield Plot(
        f"Validation {pretty(HEADLINE)}",
        "The epoch with the highest point is the one tested; a curve still rising at its end was stopped early.",
        traces,
        layout,
    )


def _diagnostics(models: Sequence[Model]) -> Iterable[Plot]:
    logged = {key for model in models for line in model.log.get("valid", []) for key in line}
    families: dict[str, list[str]] = defaultdict(list)
    for key in sorted(key for key in logged if re.fullmatch(r"\w+/block\d+", key)):
        families[key.partition("/")[0]].append(key)
    order = list(DIAGNOSTICS)
    for family in sorted(families, key=lambda name: (order.index(name) if name in order else len(order), name)):
        title, reading = DIAGNOSTICS.get(family, (pretty(family), "One line a block."))
        traces = []
        for model in models:
            for key in families[family]:
                x, y = model.series("valid", "epoch", key)
                block = int(key.rpartition("block")[2])
                if y:
                    name = f"{pretty(model.label)}, block {block}"
                    traces.append(_line(model, x, y, markers=True, dash=DASHES[block % len(DASHES)], name=name))
        yield Plot(title, reading, traces, _axes("epoch", "", zero=True))


def _dimensions(models: Sequence[Model]) -> Plot:
    """KL of every latent dimension, falling, at the epoch that is tested."""
    traces = []
    for model in models:
        for key, kl in sorted(model.best.items()):
            if re.fullmatch(r"kl_per_dimension/block\d+", key):
                block = int(key.rpartition("block")[2])
                traces.append(
                    {
                        "type": "bar",
                        "name": f"{pretty(model.label)}, block {block}",
                        "y": sorted(kl, reverse=True),
                        "marker": {"color": model.colour, "opacity": 1 / (1 + 0.6 * block)},
                        "hovertemplate": "%{y:.4f} nat",
                    }
                )
    reading = "At the epoch that is tested, dimensions ordered by their KL: a steep fall means that few carry the map."
    layout = {"barmode": "group", **_axes("latent dimension", "nat", zero=True)}
    return Plot("KL of each latent dimension", reading, traces, layout)


def _results(models: Sequence[Model]) -> Iterable[Plot]:
    for title, reading, wanted in (
        ("Test metrics", "Higher is better; every model ranks the whole catalogue for the same users.", ACCURACY),
        (
            "Catalogue coverage",
            "Share of all items (CC: of all categories) that anyone is recommended in the top k: low means everyone "
            "gets the same few.",
            ("coverage", "cc"),
        ),
    ):
        names = sorted({n for m in models for n in m.test if n.partition("@")[0] in wanted}, key=metric_order)
        traces = [
            {
                "type": "bar",
                "name": pretty(model.label),
                "x": [pretty(name).replace("@", "<br>@") for name in names],
                "y": [model.test.get(name) for name in names],
                "marker": {"color": model.colour},
                "hovertemplate": "%{y:.4f}",
            }
            for model in models
        ]
        yield Plot(title, reading, traces if names else [], {"barmode": "group", "bargap": 0.25, **_axes("", "")})

    trained = [model for model in models if finite(model.train.get("sequences_per_second"))]
    traces = [
        {
            "type": "bar",
            "orientation": "h",
            "name": pretty(model.label),
            "y": [pretty(model.label)],
            "x": [model.train["sequences_per_second"]],
            "marker": {"color": model.colour},
            "text": [f"{model.train['sequences_per_second']:,.0f}"],
            "hovertemplate": "%{x:,.0f} sequences/s",
        }
        for model in reversed(trained)
    ]
    layout = {**_axes("sequences per second", ""), "showlegend": False, "bargap": 0.5, "hovermode": "closest"}
    yield Plot("Training throughput", "All ranks together, evaluation not counted; longer is faster.", traces, layout)


def _line(
    model: Model, x: Sequence[float], y: Sequence[float], markers: bool = False, dash: str = "solid", name: str = ""
) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "lines+markers" if markers else "lines",
        "name": name or pretty(model.label),
        "x": list(x),
        "y": list(y),
        "line": {"color": model.colour, "width": 2, "dash": dash},
        "marker": {"size": 5},
        "hovertemplate": "%{y:.4g}",
    }


def _axes(x: str, y: str, zero: bool = False) -> dict[str, Any]:
    return {
        "xaxis": {"title": {"text": x}},
        "yaxis": {"title": {"text": y}, **({"rangemode": "tozero"} if zero else {})},
    }


def _thin(x: list[float], y: list[float]) -> tuple[list[float], list[float]]:
    """At most MOST_POINTS points, each the mean of its neighbours: single steps are noise at that scale."""
    size = -(-len(x) // MOST_POINTS) or 1
    chunks = [slice(start, start + size) for start in range(0, len(x), size)]
    return [sum(x[c]) / len(x[c]) for c in chunks], [sum(y[c]) / len(y[c]) for c in chunks]
