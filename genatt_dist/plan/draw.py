"""A drawing of a plan as one HTML file that needs nothing else: who holds which rows, and what fills the fullest rank.

Few ranks are drawn one by one. Of many, nodes are drawn, each with its ranks as cells; all have the same components but
for the rows, so the fullest rank's parts are drawn once, to scale.
"""

from __future__ import annotations

import html
from collections.abc import Sequence

from genatt_dist.plan.layout import Shard
from genatt_dist.plan.memory import Part
from genatt_dist.plan.run import Plan
from genatt_dist.plan.show import size

_COLOURS = (
    "#2f6db5",
    "#5a9bd5",
    "#e08a3c",
    "#f2b880",
    "#4f9d69",
    "#9ccfae",
    "#8e6bb0",
    "#c3addb",
    "#b5534f",
    "#e2a19e",
)
_WIDTH, _CELL, _GAP = 1100, 12, 3
_FEW = 16  # ranks drawn with their row ranges written out
_STYLE = (
    "body{font:14px/1.5 system-ui,sans-serif;margin:2em auto;max-width:1120px;color:#222}"
    "table{border-collapse:collapse}td,th{padding:.15em .8em .15em 0;text-align:left}"
    "td.n{text-align:right;font-variant-numeric:tabular-nums}svg{display:block;margin:.6em 0 1.4em}"
    ".fits{color:#2b7a3d}.not{color:#b02a25}small{color:#666}"
)


def draw(plan: Plan) -> str:
    """The page."""
    cluster = plan.cluster
    verdict = ("fits", "fits") if plan.fits else ("not", "does not fit")
    title = f"{cluster.world_size:,} ranks: {cluster.nodes:,} × {cluster.per_node} {cluster.machine.name}"
    changes = "".join(
        f"<li><code>{html.escape(change.override)}</code>: {size(change.bytes)}{', fits' if change.fits else ''}</li>"
        for change in plan.changes
    )
    seconds = "".join(
        f"<tr><td>{html.escape(name)}</td><td class=n>{1e3 * value:,.3g} ms</td></tr>"
        for name, value in plan.cost.seconds.items()
    )
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title><style>{_STYLE}</style>"
        f"<h1>{title}</h1><p>A model of <code>genatt plan</code>: nothing was run. "
        f"{plan.load.num_items:,} items, {plan.sizes.total:,} dense parameters.</p>"
        f"<p class={verdict[0]}><b>{verdict[1]}</b>: {size(plan.bytes)} of {size(cluster.limit)} a rank.</p>"
        + (f"<p>One after the other:</p><ol>{changes}</ol>" if changes else "")
        + f"<h2>The fullest rank</h2>{_bars(plan)}<h2>What lies where</h2>{_ranks(plan)}"
        + f"<h2>A step</h2><table>{seconds}<tr><th>all</th><td class=n>{1e3 * plan.cost.total:,.3g} ms</td></tr>"
        + f"</table><p><small>{html.escape(cluster.machine.source)}</small></p></html>\n"
    )


def _bars(plan: Plan) -> str:
    """One bar for each phase, to scale with the limit."""
    here = [part for part in plan.memory.parts if part.place == plan.place]
    always = [part for part in here if part.phase == "always"]
    phases = sorted({part.phase for part in here} - {"always"}, key=("step", "evaluation", "checkpoint").index)
    scale = (_WIDTH - 120) / max(plan.cluster.limit, plan.bytes)
    colours = {name: _COLOURS[at % len(_COLOURS)] for at, name in enumerate(dict.fromkeys(part.name for part in here))}
    drawn, y = [], 10
    for phase in phases:
        x = 100.0
        drawn.append(f'<text x="0" y="{y + 17}">{phase}</text>')
        for part in (*always, *(part for part in here if part.phase == phase)):
            drawn.append(_block(part, x, y, part.bytes * scale, colours[part.name]))
            x += part.bytes * scale
        y += 34
    limit = 100 + plan.cluster.limit * scale
    drawn.append(f'<line x1="{limit:.1f}" x2="{limit:.1f}" y1="4" y2="{y}" stroke="#b02a25" stroke-dasharray="4 3"/>')
    drawn.append(f'<text x="{limit - 4:.1f}" y="{y + 12}" text-anchor="end">{size(plan.cluster.limit)}</text>')
    legend = "".join(
        '<tr><td><svg width="12" height="12" style="display:inline;margin:0"><rect width="12" height="12" '
        f'fill="{colours[part.name]}"/></svg> {html.escape(part.name)}</td><td class=n>{size(part.bytes)}</td>'
        f"<td>{part.phase}</td><td><small>{html.escape(part.note)}</small></td></tr>"
        for part in here
    )
    return f'<svg width="{_WIDTH}" height="{y + 20}" role="img">{"".join(drawn)}</svg><table>{legend}</table>'


def _block(part: Part, x: float, y: int, width: float, colour: str) -> str:
    told = f"{part.name}: {size(part.bytes)} ({part.phase})"
    return (
        f'<rect x="{x:.1f}" y="{y}" width="{max(width, 0.5):.1f}" height="24" fill="{colour}">'
        f"<title>{html.escape(told)}</title></rect>"
    )


def _ranks(plan: Plan) -> str:
    by_rank: dict[int, list[Shard]] = {}
    for shard in plan.shards:
        by_rank.setdefault(shard.rank, []).append(shard)
    stage = plan.config.training.zero_stage
    dense = "dense parameters whole" if stage < 3 else "1/W of the dense parameters"
    parts = {0: "", 1: ", 1/W of the optimizer", 2: ", 1/W of optimizer and gradients", 3: ", optimizer and gradients"}
    said = f"<p>Every rank: {dense}{parts[stage]}"
    said += "; all item rows (replicated).</p>" if not plan.shards else f"; rows of {_names(plan.shards)}.</p>"
    if plan.cluster.world_size <= _FEW:
        return said + _listed(plan, by_rank)
    return said + _grid(plan, by_rank)


def _names(shards: Sequence[Shard]) -> str:
    return ", ".join(dict.fromkeys(html.escape(shard.table) for shard in shards))


def _listed(plan: Plan, by_rank: dict[int, list[Shard]]) -> str:
    rows = "".join(
        f"<tr><td>node {rank // plan.cluster.per_node}</td><td>rank {rank}</td><td>{_told(by_rank.get(rank, []))}</td>"
        "</tr>"
        for rank in range(plan.cluster.world_size)
    )
    return f"<table>{rows}</table>"


def _told(shards: Sequence[Shard]) -> str:
    if not shards:
        return "no rows of a sharded table"
    return "; ".join(
        f"{html.escape(shard.table)} rows {shard.first:,} … {shard.first + shard.rows - 1:,}" for shard in shards
    )


def _grid(plan: Plan, by_rank: dict[int, list[Shard]]) -> str:
    """A box a node, a cell a rank; the darker, the more of the largest number of rows it holds."""
    per_node, step = plan.cluster.per_node, _CELL + _GAP
    most = max((sum(shard.rows for shard in shards) for shards in by_rank.values()), default=0)
    box = per_node * step + _GAP
    columns = max(1, _WIDTH // (box + 8))
    drawn = []
    for node in range(plan.cluster.nodes):
        x, y = (node % columns) * (box + 8), (node // columns) * (step + 26)
        drawn.append(f'<text x="{x}" y="{y + 10}" font-size="9">node {node}</text>')
        drawn.append(
            f'<rect x="{x}" y="{y + 13}" width="{box}" height="{step + _GAP}" fill="none" stroke="#bbb" rx="2"/>'
        )
        for local in range(per_node):
            rank = node * per_node + local
            shards = by_rank.get(rank, [])
            share = sum(shard.rows for shard in shards) / most if most else 0.0
            drawn.append(
                f'<rect x="{x + _GAP + local * step}" y="{y + 13 + _GAP}" width="{_CELL}" height="{_CELL}" '
                f'fill="#2f6db5" fill-opacity="{0.1 + 0.8 * share:.2f}"><title>rank {rank}: {_told(shards)}</title>'
                "</rect>"
            )
    height = -(-plan.cluster.nodes // columns) * (step + 26) + 10
    return f'<svg width="{_WIDTH}" height="{height}" role="img">{"".join(drawn)}</svg>'
