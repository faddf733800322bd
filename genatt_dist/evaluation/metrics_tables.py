"""Tables of test metrics: for a console and a page alike, and the page's section of them with its definitions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from genatt_dist.evaluation.metrics import DEFINITIONS
from genatt_dist.evaluation.report_data import (
    BASELINE,
    HEADLINE,
    Model,
    finite,
    is_accuracy,
    is_lower_better,
    metric_order,
    number,
    pretty,
)

RATIO = f"× {BASELINE}"


def metrics_table(models: Sequence[Model]) -> tuple[list[str], list[list[tuple[str, bool]]]]:
    """Header, and for each model its cells as (text, whether it is the best of its column)."""
    names = sorted({name for model in models for name in model.test}, key=metric_order)
    best = {
        name: (min if is_lower_better(name) else max)(
            (model.test[name] for model in models if finite(model.test.get(name))), default=math.nan
        )
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


def metrics_section(report: Mapping[str, Any], models: Sequence[Model]) -> str:
    """Accuracy, what the lists hold, and what each metric is."""
    header, rows = metrics_table(models)
    if not rows:
        return "<section><h2>Test metrics</h2><p>The report holds no model.</p></section>"
    note = "Best of a column in bold."
    if RATIO in header:
        note += f" {RATIO}: {pretty(HEADLINE)} over {BASELINE}'s."
    scored = [(model.test["recall@10"], model.users) for model in models if finite(model.test.get("recall@10"))]
    highest, users = max(((recall, users) for recall, users in scored if users), default=(0.0, None))
    if users:
        error = math.sqrt(highest * (1 - highest) / users)
        paired = "below" if families_of(report) else "of `genatt compare`"
        note += (
            f" Over the {users:,} users evaluated the standard error of a Recall@10 of {highest:.3f} is about "
            f"{error:.4f}. That is unpaired, of one model by itself: whether two models differ, the paired comparison "
            f"{paired} says, and more seeds."
        )
    header.insert(1, "seed")
    for model, row in zip(models, rows, strict=True):
        row.insert(1, (number(model.seed), False))
    names = sorted({name for model in models for name in model.test}, key=metric_order)
    lists = [place for place, name in enumerate(names, start=2) if not is_accuracy(name)]
    ranks = [place for place in range(len(header)) if place not in lists]
    shown = dict.fromkeys(name.partition("@")[0] for name in names)
    terms = "".join(
        f"<tr><th>{escape(pretty(name))}</th><td>{escape(DEFINITIONS[name])}</td></tr>"
        for name in shown
        if name in DEFINITIONS
    )
    return (
        f'<section><h2>Test metrics</h2>{_columns(header, rows, ranks)}<p class="muted">{escape(note)}</p>'
        + (f"<h3>What the lists hold</h3>{_columns(header, rows, [0, 1, *lists])}" if lists else "")
        + "<details><summary>Definitions</summary>"
        f'<div class="scroll"><table class="facts"><tbody>{terms}</tbody></table></div></details></section>'
    )


def _columns(header: Sequence[str], rows: Sequence[Sequence[tuple[str, bool]]], places: Sequence[int]) -> str:
    return html_table([header[place] for place in places], [[row[place] for place in places] for row in rows])


def families_of(report: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The families of paired comparisons that hold any."""
    return [family for family in (report.get("comparisons") or {}).get("families", []) if family["rows"]]


def html_table(header: Sequence[str], rows: Sequence[Sequence[tuple[str, bool]]]) -> str:
    """Rows of (text, whether it is the best of its column) as HTML that scrolls where it is wide."""
    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    body = "".join(
        f"<tr><th>{escape(row[0][0])}</th>"
        + "".join(f"<td>{f'<b>{escape(text)}</b>' if best else escape(text)}</td>" for text, best in row[1:])
        + "</tr>"
        for row in rows
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
