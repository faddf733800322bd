"""Verbs about machines: plan, doctor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from genatt_dist.cli.app import app, examples


@app.command(
    epilog=examples(
        "genatt plan configs/quickstart.yaml --nodes 1 --gpus-per-node 2 --gpu cpu",
        "genatt plan CONFIG --nodes 128 --gpus-per-node 8 --gpu h100 --items 500000000 --out plan.html "
        "table.kind=sharded loss.kind=sampled",
    )
)
def plan(
    config: Annotated[Path, typer.Argument(help="YAML file of a run.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Overrides, e.g. table.kind=sharded.")
    ] = None,
    nodes: Annotated[int, typer.Option(min=1, help="Machines.")] = 1,
    gpus_per_node: Annotated[int, typer.Option(min=1, help="Ranks on each, with a GPU each.")] = 8,
    gpu: Annotated[str, typer.Option(help="h100, h200, a100, l4, or cpu.")] = "h100",
    memory: Annotated[float | None, typer.Option(help="GiB of a rank; default: the device's.")] = None,
    items: Annotated[int | None, typer.Option(min=2, help="Catalogue, in place of the data's manifest.")] = None,
    length: Annotated[
        float | None, typer.Option(min=2, help="Interactions of a user on average, with --items; default: long ones.")
    ] = None,
    as_json: Annotated[str | None, typer.Option("--json", metavar="FILE", help="Write JSON; - for stdout.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write a drawing of what lies where (HTML).")] = None,
) -> None:
    """Estimate memory of each rank and time of a step on a cluster, without one. A model, not a measurement."""
    from genatt_dist import config as configuration
    from genatt_dist.plan.run import command

    settings = {"nodes": nodes, "per_node": gpus_per_node, "gpu": gpu, "gib": memory}
    command(configuration.load(config, overrides or []), settings, items, length, as_json, out, Console())


@app.command(epilog=examples("genatt doctor", "genatt doctor --json"))
def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Check this machine: versions, GPU, compilers, shared memory, loopback, folders. Exit code 1 when something
    fails.
    """
    from dataclasses import asdict

    from genatt_dist.doctor import examine, print_table

    checks = examine()
    if as_json:
        print(json.dumps([asdict(check) for check in checks], indent=2))
    else:
        print_table(checks)
    if any(check.ok is False for check in checks):
        raise typer.Exit(1)
