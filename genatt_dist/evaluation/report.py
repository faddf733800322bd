"""What a comparison of trained models found, as one JSON file, one HTML page that opens without a network, and a table.

`write_report` draws the page from the report's numbers and each run's `metrics.jsonl`; `print_table` shows the same
metrics on a console. Nothing here computes a metric: every number comes from the evaluation or the trainer's log.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from genatt_dist.evaluation.plots import plots
from genatt_dist.evaluation.report_data import (
    BASELINE,
    HEADLINE,
    Model,
    finite,
    metric_order,
    number,
    pretty,
    read_models,
)

RATIO = f"× {BASELINE}"


def write_report(report: dict[str, Any], runs: Mapping[str, Path], out: Path) -> None:
    """Write out/report.json (the report) and out/report.html (the page).

    runs: model name → run directory; metrics.jsonl and environment.json in it are used where they are there.
    """
    out.mkdir(parents=True, exist_ok=True)
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    (out / "report.html").write_text(render(report, read_models(report, runs)), encoding="utf-8")


def print_table(report: dict[str, Any], console: Console | None = None) -> None:
    """The test metrics on a console, a line each (that fits 80 columns), the best model's bold."""
    header, rows = metrics_table(read_models(report, {}))
    table = Table(title=_summary_line(report), title_justify="left", title_style="", box=None, pad_edge=False)
    table.add_column("test")
    for row in rows:
        table.add_column(row[0][0].replace("[", r"\["), justify="right")
    for index, name in enumerate(header[1:], start=1):
        table.add_row(name, *(f"[bold]{row[index][0]}[/]" if row[index][1] else row[index][0] for row in rows))
    (console or Console()).print(table)


def metrics_table(models: Sequence[Model]) -> tuple[list[str], list[list[tuple[str, bool]]]]:
    """Header, and for each model its cells as (text, whether it is the best of its column)."""
    names = sorted({name for model in models for name in model.test}, key=metric_order)
    best = {
        name: max((model.test[name] for model in models if finite(model.test.get(name))), default=math.nan)
        for name in names
    }
    base = next((model.test.get(HEADLINE) for model in models if model.label.startswith(BASELINE)), None)
    base = base if finite(base) and base > 0 else None
    rows = []
    for model in models:
        row = [(pretty(model.label), False)]
        for name in names:
            value = model.test.get(name)
            row.append((f"{value:.4f}", value == best[name]) if finite(value) else ("–", False))
        if base is not None:
            value = model.test.get(HEADLINE)
            row.append((f"{value / base:.2f}×", value == best[HEADLINE]) if finite(value) else ("–", False))
        rows.append(row)
    return ["model", *map(pretty, names), *([RATIO] if base is not None else [])], rows


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
    scored = [model for model in models if finite(model.test.get(HEADLINE))]
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
    highest = max((recall for recall in recalls if finite(recall)), default=None)
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
    rows = [[(pretty(m.label), False), *((number(m.train.get(key)), False) for key in keys)] for m in trained]
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


def _summary_line(report: Mapping[str, Any]) -> str:
    dataset = report.get("dataset", {})
    counts = [f"{number(dataset[key])} {key}" for key in ("users", "items", "interactions") if key in dataset]
    return f"{dataset.get('name', 'unnamed data')}: {', '.join(counts)}" if counts else str(dataset.get("name", ""))


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
