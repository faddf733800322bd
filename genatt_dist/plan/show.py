"""A plan in words, for a terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from genatt_dist.plan.run import USED, Plan


def size(count: float) -> str:
    """Bytes as a reader wants them."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:,.3g} TiB"


def show(plan: Plan, console: Console) -> None:
    """Verdict, memory of the fullest rank, time of a step, what to change."""
    cluster, machine = plan.cluster, plan.cluster.machine
    ranks = "rank" if cluster.world_size == 1 else "ranks"
    console.print(
        f"[bold]{cluster.world_size:,} {ranks}[/] ({cluster.nodes:,} × {cluster.per_node} {machine.name}), "
        f"{plan.load.num_items:,} items, {plan.sizes.total:,} dense parameters; an estimate, nothing was run"
    )
    table = Table(title="Memory of the fullest rank", title_justify="left")
    for heading in ("part", "size", "where", "when", "how it was found"):
        table.add_column(heading, justify="right" if heading == "size" else "left")
    for part in plan.memory.parts:
        table.add_row(part.name, size(part.bytes), part.place, part.phase, part.note)
    console.print(table)
    times = Table(title="Time of a step", title_justify="left")
    times.add_column("part")
    times.add_column("ms", justify="right")
    for name, seconds in plan.cost.seconds.items():
        times.add_row(name, f"{1e3 * seconds:,.3g}")
    times.add_row("all", f"{1e3 * plan.cost.total:,.3g}")
    console.print(times)
    console.print(
        f"{plan.cost.tokens / plan.cost.total:,.0f} tokens/s on all ranks; constants of {machine.name}: "
        f"{machine.source}",
        highlight=False,
    )
    verdict = "[green]fits[/]" if plan.fits else "[red]does not fit[/]"
    console.print(
        f"{verdict}: {size(plan.bytes)} of {size(cluster.limit)} a rank ({plan.place} memory, of which a plan may fill "
        f"{USED:.0%})"
    )
    if plan.place == "device":
        host = plan.memory.peak("host")
        console.print(f"beside it {size(host)} of the machine's memory a rank, {size(host * cluster.per_node)} a node")
    for change in plan.changes:
        console.print(
            f"  with {change.override}: {size(change.bytes)}{', fits' if change.fits else ''}", highlight=False
        )
