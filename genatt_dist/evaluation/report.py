"""What a comparison of trained models found, as one JSON file, one HTML page that opens without a network, and a table.

`write_report` draws the page from the report's numbers and each run's `metrics.jsonl`; `print_table` shows the same
metrics on a console. Nothing here computes a metric: every number comes from the evaluation or the trainer's log.
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any, TypeGuard

from rich.console import Console
from rich.table import Table

BASELINE = "popularity"
HEADLINE = "ndcg@10"
RATIO = f"× {BASELINE}"

# One colour a model on every plot, readable on light and dark; models not named here take the spare ones in order.
COLOURS = {BASELINE: "#8b929c", "dot_product": "#3f7fd0", "variational": "#d9822b", "diffusion": "#1f9d77"}
SPARE_COLOURS = ("#9b59c9", "#c94f6d", "#7a8b2a", "#2a9fb0")
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
    "kappa": ("Sharpness κ of the generated logits", "Rising means rows of the map get more peaked; mean over heads."),
    "residual_scale": ("Residual scale ς", "Size of what diffusion adds to the mean map; near 0 it adds nothing."),
    "kl_mean": ("KL per latent dimension (nat)", "Near 0 the latent carries nothing: posterior collapse."),
    "active_units": (
        "Active latent units",
        "Latent dimensions that depend on the input; few means it is not used.",
    ),
}


@dataclass
class Model:
    """One row of the report with the log of its run."""

    label: str
    colour: str
    test: Mapping[str, float]
    valid: Mapping[str, float]
    train: Mapping[str, Any]
    log: Mapping[str, list[dict[str, Any]]] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)

    def series(self, kind: str, x: str, y: str) -> tuple[list[float], list[float]]:
        """The finite values of y against x in the lines of one kind."""
        pairs = [(line[x], line[y]) for line in self.log.get(kind, []) if _finite(line.get(x)) and _finite(line.get(y))]
        return [pair[0] for pair in pairs], [pair[1] for pair in pairs]


@dataclass
class Plot:
    """A figure with its heading and one sentence on how to read it. traces and layout are plotly's JSON."""

    title: str
    reading: str
    traces: list[dict[str, Any]]
    layout: dict[str, Any]


def write_report(report: dict[str, Any], runs: Mapping[str, Path], out: Path) -> None:
    """Write out/report.json (the report) and out/report.html (the page).

    runs: model name → run directory; metrics.jsonl and environment.json in it are used where they are there.
    """
    out.mkdir(parents=True, exist_ok=True)
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    (out / "report.html").write_text(render(report, _models(report, runs)), encoding="utf-8")


def print_table(report: dict[str, Any], console: Console | None = None) -> None:
    """The test metrics on a console, a line each (that fits 80 columns), the best model's bold."""
    header, rows = metrics_table(_models(report, {}))
    table = Table(title=_summary_line(report), title_justify="left", title_style="", box=None, pad_edge=False)
    table.add_column("test")
    for row in rows:
        table.add_column(row[0][0].replace("[", r"\["), justify="right")
    for index, name in enumerate(header[1:], start=1):
        table.add_row(name, *(f"[bold]{row[index][0]}[/]" if row[index][1] else row[index][0] for row in rows))
    (console or Console()).print(table)


def metrics_table(models: Sequence[Model]) -> tuple[list[str], list[list[tuple[str, bool]]]]:
    """Header, and for each model its cells as (text, whether it is the best of its column)."""
    names = sorted({name for model in models for name in model.test}, key=_metric_order)
    best = {
        name: max((model.test[name] for model in models if _finite(model.test.get(name))), default=math.nan)
        for name in names
    }
    base = next((model.test.get(HEADLINE) for model in models if model.label.startswith(BASELINE)), None)
    base = base if _finite(base) and base > 0 else None
    rows = []
    for model in models:
        row = [(pretty(model.label), False)]
        for name in names:
            value = model.test.get(name)
            row.append((f"{value:.4f}", value == best[name]) if _finite(value) else ("–", False))
        if base is not None:
            value = model.test.get(HEADLINE)
            row.append((f"{value / base:.2f}×", value == best[HEADLINE]) if _finite(value) else ("–", False))
        rows.append(row)
    return ["model", *map(pretty, names), *([RATIO] if base is not None else [])], rows


# --- reading ----------------------------------------------------------------------------------------------------------


def _models(report: Mapping[str, Any], runs: Mapping[str, Path]) -> list[Model]:
    entries = report.get("models", [])
    names = [entry["name"] for entry in entries]
    spare = iter(SPARE_COLOURS * (len(entries) // len(SPARE_COLOURS) + 1))
    models = []
    for entry in entries:
        name = entry["name"]
        # The same model at several seeds: the seed tells them apart.
        label = f"{name} (seed {entry.get('seed')})" if names.count(name) > 1 else name
        run = runs.get(label, runs.get(name))
        models.append(
            Model(
                label=label,
                colour=COLOURS[name] if label in COLOURS else next(spare),
                test=entry.get("test") or {},
                valid=entry.get("valid") or {},
                train=entry.get("train") or {},
                log=_read_log(Path(run) / "metrics.jsonl") if run else {},
                environment=_read_environment(Path(run) / "environment.json") if run else {},
            )
        )
    return models


def _read_log(path: Path) -> dict[str, list[dict[str, Any]]]:
    """Lines of metrics.jsonl by kind. A line that a killed run left half written is passed over."""
    lines: dict[str, list[dict[str, Any]]] = defaultdict(list)
    if path.is_file():
        for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                line = json.loads(text)
            except json.JSONDecodeError:
                continue
            if isinstance(line, dict):
                lines[line.get("kind", "")].append(line)
    return lines


def _read_environment(path: Path) -> dict[str, str]:
    try:
        return dict(_flatten(json.loads(path.read_text(encoding="utf-8"))))
    except (OSError, json.JSONDecodeError):
        return {}


def _flatten(value: Any, prefix: str = "") -> Iterable[tuple[str, str]]:
    if isinstance(value, dict):
        for key, part in value.items():
            yield from _flatten(part, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(value, list):
        yield prefix, ", ".join(map(str, value))
    else:
        yield prefix, str(value)


# --- plots ------------------------------------------------------------------------------------------------------------


def plots(models: Sequence[Model]) -> list[Plot]:
    """Every plot there are numbers for."""
    return [plot for plot in (*_training(models), *_diagnostics(models), *_results(models)) if plot.traces]


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
        if traces and not model.train and _finite(level := model.valid.get(HEADLINE)):
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


def _results(models: Sequence[Model]) -> Iterable[Plot]:
    for title, reading, wanted in (
        ("Test metrics", "Higher is better; every model ranks the whole catalogue for the same users.", False),
        (
            "Catalogue coverage",
            "Share of all items that anyone is recommended in the top k: low means everyone gets the same few.",
            True,
        ),
    ):
        names = sorted(
            {n for model in models for n in model.test if n.startswith("coverage") == wanted}, key=_metric_order
        )
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

    trained = [model for model in models if _finite(model.train.get("sequences_per_second"))]
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
        "hovertemplate": "%{y:.4f}",
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


# --- page -------------------------------------------------------------------------------------------------------------


def render(report: Mapping[str, Any], models: Sequence[Model]) -> str:
    """The whole page as one string, plotly's script included."""
    from plotly.offline import get_plotlyjs  # 4 MB of script: read only when a page is written

    figures = plots(models)
    sections = [_metrics_section(report, models)]
    if figures:
        cells = "".join(
            f'<figure><h3>{escape(plot.title)}</h3><div class="plot" id="plot{index}"></div>'
            f"<figcaption>{escape(plot.reading)}</figcaption></figure>"
            for index, plot in enumerate(figures)
        )
        sections.append(f'<section><h2>Plots</h2><div class="grid">{cells}</div></section>')
    else:
        sections.append("<section><h2>Plots</h2><p>No run wrote metrics to draw.</p></section>")
    sections += [_training_section(models), _environment_section(models)]
    # "<" is escaped so that no text in the data can end the script element.
    data = json.dumps(_without_nan([[plot.traces, plot.layout] for plot in figures])).replace("<", "\\u003c")
    script = f"<script>{get_plotlyjs()}</script><script>const PLOTS = {data};{_SCRIPT}</script>" if figures else ""
    title = f"genatt-dist: {report.get('dataset', {}).get('name', 'report')}"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>\n<body><main>"
        f"{_header(report, models)}{''.join(sections)}</main>{script}</body></html>\n"
    )


def _header(report: Mapping[str, Any], models: Sequence[Model]) -> str:
    scored = [model for model in models if _finite(model.test.get(HEADLINE))]
    lead = ""
    if scored:
        top = max(scored, key=lambda model: model.test[HEADLINE])
        lead = f"Highest {pretty(HEADLINE)} on test: {pretty(top.label)}, {top.test[HEADLINE]:.4f}."
    name = report.get("dataset", {}).get("name", "report")
    protocol = " · ".join(f"{pretty(str(key))}: {value}" for key, value in report.get("protocol", {}).items())
    return (
        f"<header><h1>Generated attention on {escape(str(name))}</h1>"
        f"<p>{escape(_summary_line(report))}</p>"
        + (f'<p class="muted">{escape(protocol)}</p>' if protocol else "")
        + (f'<p class="lead">{escape(lead)}</p>' if lead else "")
        + "</header>"
    )


def _metrics_section(report: Mapping[str, Any], models: Sequence[Model]) -> str:
    header, rows = metrics_table(models)
    if not rows:
        return "<section><h2>Test metrics</h2><p>The report holds no model.</p></section>"
    note = "Best of a column in bold."
    if RATIO in header:
        note += f" {RATIO}: {pretty(HEADLINE)} over {BASELINE}'s."
    users, recalls = report.get("dataset", {}).get("users"), [model.test.get("recall@10") for model in models]
    highest = max((recall for recall in recalls if _finite(recall)), default=None)
    if users and highest is not None:
        error = math.sqrt(highest * (1 - highest) / users)
        note += (
            f" With {users:,} users the standard error of a Recall@10 of {highest:.3f} is about {error:.4f}: "
            "differences of that size are noise unless a paired test or more seeds say otherwise."
        )
    return f'<section><h2>Test metrics</h2>{_table(header, rows)}<p class="muted">{escape(note)}</p></section>'


def _training_section(models: Sequence[Model]) -> str:
    trained = [model for model in models if model.train]
    if not trained:
        return ""
    keys = list(dict.fromkeys(key for model in trained for key in model.train))
    rows = [[(pretty(m.label), False), *((_number(m.train.get(key)), False) for key in keys)] for m in trained]
    return f"<section><h2>Training</h2>{_table(['model', *map(pretty, keys)], rows)}</section>"


def _environment_section(models: Sequence[Model]) -> str:
    """What the runs ran on: a value all runs share once, others by model."""
    known = [model for model in models if model.environment]
    if not known:
        return ""
    rows = []
    for key in dict.fromkeys(key for model in known for key in model.environment):
        values = {pretty(model.label): model.environment.get(key, "–") for model in known}
        distinct = set(values.values())
        text = distinct.pop() if len(distinct) == 1 else "; ".join(f"{name}: {v}" for name, v in values.items())
        rows.append(f"<tr><th>{escape(key)}</th><td>{escape(text)}</td></tr>")
    return (
        "<section><h2>Environment</h2><details><summary>Versions and hardware of these runs</summary>"
        f'<div class="scroll"><table class="facts"><tbody>{"".join(rows)}</tbody></table></div></details></section>'
    )


def _table(header: Sequence[str], rows: Sequence[Sequence[tuple[str, bool]]]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    body = "".join(
        f"<tr><th>{escape(row[0][0])}</th>"
        + "".join(f"<td>{f'<b>{escape(text)}</b>' if best else escape(text)}</td>" for text, best in row[1:])
        + "</tr>"
        for row in rows
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


# --- text -------------------------------------------------------------------------------------------------------------


def pretty(name: str) -> str:
    """A key as a reader writes it: ndcg@10 → NDCG@10, dot_product → dot product, zero_stage → ZeRO stage."""
    for key, text in {"ndcg": "NDCG", "mrr": "MRR", "recall": "Recall", "coverage": "Coverage"}.items():
        if re.fullmatch(rf"{key}(@.*)?", name):
            return text + name[len(key) :]
    return name.replace("sequences_per_second", "sequences/s").replace("zero_stage", "ZeRO stage").replace("_", " ")


def _summary_line(report: Mapping[str, Any]) -> str:
    dataset = report.get("dataset", {})
    counts = [f"{_number(dataset[key])} {key}" for key in ("users", "items", "interactions") if key in dataset]
    return f"{dataset.get('name', 'unnamed data')}: {', '.join(counts)}" if counts else str(dataset.get("name", ""))


def _metric_order(name: str) -> tuple[int, str, int]:
    metric, _, k = name.partition("@")
    order = ("recall", "ndcg", "mrr", "coverage")
    return (order.index(metric) if metric in order else len(order), metric, int(k) if k.isdigit() else 0)


def _number(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:,.1f}" if math.isfinite(value) else str(value)
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _finite(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _without_nan(value: Any) -> Any:
    """NaN and infinities as null: browsers refuse them in JSON."""
    if isinstance(value, list):
        return [_without_nan(part) for part in value]
    if isinstance(value, dict):
        return {key: _without_nan(part) for key, part in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


_STYLE = """
:root { --back: #ffffff; --card: #f7f8fa; --text: #1c2128; --muted: #5d6672; --rule: #dde1e7; --accent: #2563b8; }
@media (prefers-color-scheme: dark) {
  :root { --back: #14171c; --card: #1c2026; --text: #e4e7eb; --muted: #9aa3af; --rule: #30363f; --accent: #7db0f2; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--text); line-height: 1.5;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 1200px; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .4rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .7rem; }
h3 { font-size: .95rem; margin: 0; }
p { margin: .25rem 0; overflow-wrap: anywhere; }
figcaption { margin-top: .4rem; }
.muted, figcaption, summary { color: var(--muted); font-size: .88rem; }
.lead { margin-top: .9rem; font-weight: 600; color: var(--accent); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; margin-bottom: .5rem; }
th, td { padding: .4rem .5rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--rule); }
thead th { color: var(--muted); font-weight: 500; border-bottom-width: 2px; }
tr > th:first-child { text-align: left; position: sticky; left: 0; background: var(--back); padding-left: 0; }
tbody th { font-weight: 500; }
td b { color: var(--accent); }
.facts { margin-top: .5rem; }
.facts td { text-align: left; white-space: normal; overflow-wrap: anywhere; }
.grid { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 460px), 1fr)); }
figure { margin: 0; padding: 1rem; background: var(--card); border-radius: 8px; min-width: 0; }
.plot { height: 350px; }
"""

# Colours follow the page's, also when the reader switches between light and dark while it is open.
_SCRIPT = """
const dark = window.matchMedia("(prefers-color-scheme: dark)");
function draw() {
  const style = getComputedStyle(document.documentElement);
  const colour = name => style.getPropertyValue(name).trim();
  const axis = { gridcolor: colour("--rule"), zerolinecolor: colour("--rule"), automargin: true };
  PLOTS.forEach(([traces, layout], index) => Plotly.react("plot" + index, traces, {
    showlegend: traces.length > 1, hovermode: "x unified", ...layout,
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    hoverlabel: { bgcolor: colour("--back"), bordercolor: colour("--rule") },
    font: { color: colour("--muted"), size: 12, family: "system-ui, sans-serif" },
    margin: { l: 8, r: 8, t: 12, b: 8 }, legend: { orientation: "h", yref: "container", y: 0, yanchor: "bottom" },
    xaxis: { ...axis, ...layout.xaxis }, yaxis: { ...axis, ...layout.yaxis },
  }, { displayModeBar: false, responsive: true }));
}
draw();
dark.addEventListener("change", draw);
"""
