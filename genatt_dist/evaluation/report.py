"""What a comparison of trained models found, as one JSON file, one HTML page that opens without a network, and a table.

`write_report` draws the page from the report's numbers and each run's `metrics.jsonl`; `print_table` shows the same
metrics on a console. Nothing here computes a metric: every number comes from the evaluation or the trainer's log.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from genatt_dist.evaluation.compare import cells
from genatt_dist.evaluation.metrics_tables import families_of, html_table, metrics_section, metrics_table
from genatt_dist.evaluation.page import SCRIPT, STYLE
from genatt_dist.evaluation.plots import Plot, plots
from genatt_dist.evaluation.report_data import (
    HEADLINE,
    Model,
    chosen_maps,
    finite,
    number,
    pretty,
    read_models,
    without_nan,
)


def write_report(report: dict[str, Any], runs: Mapping[str, Path], out: Path) -> None:
    """Write out/report.json (the report) and out/report.html (the page).

    runs: model name → run directory; metrics.jsonl, environment.json and maps-test.json in it are used where they are
    there. report["steps"], where it is there, holds rows of `genatt bench steps`; report["comparisons"] families of
    paired comparisons, as a study makes them.
    """
    page = render(report, read_models(report, runs))  # what cannot be drawn leaves nothing behind
    out.mkdir(parents=True, exist_ok=True)
    (out / "report.json").write_text(json.dumps(without_nan(report), indent=2) + "\n", encoding="utf-8")
    (out / "report.html").write_text(page, encoding="utf-8")


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


# --- page -------------------------------------------------------------------------------------------------------------


def render(report: Mapping[str, Any], models: Sequence[Model]) -> str:
    """The whole page as one string, plotly's script included."""
    from plotly.offline import get_plotlyjs  # 4 MB of script: read only when a page is written

    figures, steps, maps = plots(models), _steps(report), chosen_maps(models)
    sections = [
        metrics_section(report, models),
        _comparisons_section(report),
        _warnings_section(models),
        _plots_section("Plots", figures, 0) or "<section><h2>Plots</h2><p>No run wrote metrics to draw.</p></section>",
        _maps_section(models, maps),
        _plots_section("Cost of diffusion steps", steps, len(figures)),
        _training_section(models),
        _performance_section(models),
        _environment_section(models),
    ]
    figures += steps
    data = (
        f"const PLOTS = {_json([[plot.traces, plot.layout] for plot in figures])};const MAPS = {_json(maps or None)};"
    )
    script = f"<script>{get_plotlyjs()}</script><script>{data}{SCRIPT}</script>" if figures or maps else ""
    title = f"genatt-dist: {report.get('dataset', {}).get('name', 'report')}"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body><main>"
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


def _comparisons_section(report: Mapping[str, Any]) -> str:
    """A table for each family and metric; those of other metrics than the first are folded."""
    families = families_of(report)
    if not families:
        return ""
    comparisons = report["comparisons"]
    bootstrap, parts = comparisons["bootstrap"], []
    share = f"{bootstrap['confidence']:.0%}"
    for family in families:
        parts.append(f"<h3>{escape(family['question'])}</h3>")
        named = dict.fromkeys(row["metric"] for row in family["rows"])
        for index, metric in enumerate(sorted(named, key=lambda name: name != HEADLINE)):
            names = ("difference", "relative", f"{share} interval", "p", "p (Holm)")
            rows = [
                [(text, False) for text in (pretty(row["arm"]), pretty(row["against"]), *cells(row))]
                for row in family["rows"]
                if row["metric"] == metric
            ]
            table = html_table(["model", "against", pretty(metric), *names], rows)
            parts.append(f"<details><summary>{escape(pretty(metric))}</summary>{table}</details>" if index else table)
    note = (
        f"Paired by user on {comparisons['split']}: {bootstrap['resamples']:,} bootstrap resamples of users. p (Holm): "
        f"{comparisons['correction']}. An interval is of these trained models; how far other seeds would move them is "
        "not in it."
    )
    return f'<section><h2>Paired comparisons</h2>{"".join(parts)}<p class="muted">{escape(note)}</p></section>'


def _warnings_section(models: Sequence[Model]) -> str:
    """The failure signs that the trainer told of each model."""
    told = [(model, line) for model in models for line in model.log.get("warning", [])]
    if not told:
        diagnosed = any(model.log.get("valid") for model in models)
        text = "No run showed a failure sign: none was told while they trained."
        return f'<section><h2>Warnings</h2><p class="muted">{text}</p></section>' if diagnosed else ""
    rows = "".join(
        f"<tr><th>{escape(pretty(model.label))}</th><td>step {number(line.get('step'))}</td>"
        f"<td>{escape(str(line.get('text', line.get('sign', ''))))}</td></tr>"
        for model, line in told
    )
    return (
        '<section><h2>Warnings</h2><div class="scroll"><table class="warning"><tbody>'
        f"{rows}</tbody></table></div></section>"
    )


def _plots_section(title: str, figures: Sequence[Plot], first: int) -> str:
    """first: number of the first figure on the page."""
    cells = "".join(
        f'<figure><h3>{escape(plot.title)}</h3><div class="plot" id="plot{index}"></div>'
        f"<figcaption>{escape(plot.reading)}</figcaption></figure>"
        for index, plot in enumerate(figures, start=first)
    )
    return f'<section><h2>{escape(title)}</h2><div class="grid">{cells}</div></section>' if figures else ""


def _steps(report: Mapping[str, Any]) -> list[Plot]:
    """What `genatt bench steps` measured, where the report holds it."""
    if not report.get("steps"):
        return []
    from genatt_dist.evaluation.steps_plots import steps_plots

    return [plot for plot in steps_plots(report["steps"]) if plot.traces]


def _maps_section(models: Sequence[Model], maps: Sequence[Mapping[str, Any]]) -> str:
    if not maps:
        return ""
    controls = "".join(
        f'<label>{name} <select id="map-{name.lower()}"></select></label>' for name in ("Model", "User", "Block")
    )
    left_out = sum(1 for model in models if model.maps) - len(maps)
    note = (
        "Row i, from the top, is the map after the i-th item of the history; its columns are the items up to it, "
        "oldest left. The colour is the weight relative to an even spread over them (1 × even); the last row is what "
        "ranks the next item."
    ) + (f" {left_out} more models have maps, left out to keep the page small." if left_out else "")
    return (
        f'<section><h2>Attention maps of some users</h2><p class="muted">{note}</p><figure><div class="controls">'
        f'{controls}</div><p class="muted" id="map-facts"></p><div class="maps" id="maps"></div></figure></section>'
    )


def _training_section(models: Sequence[Model]) -> str:
    trained = [model for model in models if model.train]
    if not trained:
        return ""
    keys = list(dict.fromkeys(key for model in trained for key in model.train))
    rows = [[(pretty(m.label), False), *((number(m.train.get(key)), False) for key in keys)] for m in trained]
    return f"<section><h2>Training</h2>{html_table(['model', *map(pretty, keys)], rows)}</section>"


def _performance_section(models: Sequence[Model]) -> str:
    """Where a training step's time went, from the record that ends each run's log."""
    measured = [(model, model.log["performance"][-1]) for model in models if model.log.get("performance")]
    parts = list(dict.fromkeys(key for _, record in measured for key in record if key.startswith("step_seconds/")))
    if not parts:
        return ""
    header = ["model", *(f"{pretty(part.partition('/')[2])}, ms" for part in parts)]
    header += ["sequences/s", "tokens/s", "most memory of a rank, GiB", "of the matmul peak"]
    rows = []
    for model, record in measured:
        values = [1e3 * record[part] if finite(record.get(part)) else None for part in parts]
        values += [record.get("sequences_per_second"), record.get("tokens_per_second")]
        values.append(max(record.get("peak_memory_gib/host", []), default=None))
        share = record.get("fraction_of_matmul_peak")
        cells = [*map(number, values), f"{share:.1%}" if finite(share) else "–"]
        rows.append([(text, False) for text in (pretty(model.label), *cells)])
    note = (
        "One training step, the mean over steps and ranks. Input is waiting for a batch, lookup the exchange of ids "
        "and rows of a sharded table; their gradients go back in backward. The matmul peak is what rank 0's device "
        "reached in one large product."
    )
    return f'<section><h2>Performance</h2>{html_table(header, rows)}<p class="muted">{escape(note)}</p></section>'


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


# --- text -------------------------------------------------------------------------------------------------------------


def _summary_line(report: Mapping[str, Any]) -> str:
    dataset = report.get("dataset", {})
    counts = [f"{number(dataset[key])} {key}" for key in ("users", "items", "interactions") if key in dataset]
    return f"{dataset.get('name', 'unnamed data')}: {', '.join(counts)}" if counts else str(dataset.get("name", ""))


def _json(value: Any) -> str:
    """As a script's literal; "<" is escaped so that no text in the data can end the script element."""
    return json.dumps(without_nan(value), separators=(",", ":")).replace("<", "\\u003c")
