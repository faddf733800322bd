"""Verbs about data: prepare, inspect."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from genatt_dist.cli.app import app, examples, stderr

_COLUMNS, _CLEANING, _ITEMS = "Columns", "Cleaning", "Items"
_USERS, _OUTPUT, _RESOURCES = "Users and split", "Output", "Resources (they do not change the result)"


@app.command(
    epilog=examples(
        "genatt prepare ml-100k --out shards/ml-100k",
        "genatt prepare 's3://bucket/log/*.parquet' --user-column uid --event-column kind "
        "--event-weights view=1,cart=3 --split time:2024-06-01,2024-07-01 --out s3://bucket/shards --dry-run",
    )
)
def prepare(
    context: typer.Context,
    source: Annotated[
        str | None,
        typer.Argument(
            help="A known set (ml-100k, ml-1m, …), synthetic[:users=N,…], or a file, directory or glob (any fsspec "
            "path)."
        ),
    ] = None,
    out: Annotated[str | None, typer.Option(help="Directory to create (any fsspec path).")] = None,
    format: Annotated[str, typer.Option(help="auto, parquet, csv or jsonl.", rich_help_panel="Source")] = "auto",
    separator: Annotated[
        str | None, typer.Option(help="CSV; default: tab for .tsv, else comma.", rich_help_panel="Source")
    ] = None,
    user_column: Annotated[str, typer.Option(help="Column of user ids.", rich_help_panel=_COLUMNS)] = "user_id",
    item_column: Annotated[str, typer.Option(help="Column of item ids.", rich_help_panel=_COLUMNS)] = "item_id",
    time_column: Annotated[
        str,
        typer.Option(help="Column of times; empty: the row order is the sequence.", rich_help_panel=_COLUMNS),
    ] = "timestamp",
    id_type: Annotated[
        str,
        typer.Option(help="auto, or string: keep every id as text (007 is not 7).", rich_help_panel=_COLUMNS),
    ] = "auto",
    time_unit: Annotated[
        str,
        typer.Option(help="Of numeric times: s, ms, us, ns, or auto (by their size).", rich_help_panel=_COLUMNS),
    ] = "auto",
    event_column: Annotated[
        str | None, typer.Option(help="Column of event types; needs --event-weights.", rich_help_panel=_COLUMNS)
    ] = None,
    event_weights: Annotated[
        str | None,
        typer.Option(
            metavar="EVENT=WEIGHT,…",
            help="Weight of each event type; rows of others, or of weight 0, are dropped.",
            rich_help_panel=_CLEANING,
        ),
    ] = None,
    time_from: Annotated[
        str | None,
        typer.Option(
            help="Keep rows from this time on: a number in the column's unit, or an ISO date.",
            rich_help_panel=_CLEANING,
        ),
    ] = None,
    time_to: Annotated[str | None, typer.Option(help="Keep rows before this time.", rich_help_panel=_CLEANING)] = None,
    duplicates: Annotated[
        str, typer.Option(help="Rows to drop: none, exact or consecutive.", rich_help_panel=_CLEANING)
    ] = "none",
    min_user: Annotated[
        int, typer.Option(help="k-core: interactions a user must have.", rich_help_panel=_CLEANING)
    ] = 5,
    min_item: Annotated[
        int, typer.Option(help="k-core: interactions an item must have.", rich_help_panel=_CLEANING)
    ] = 5,
    items: Annotated[
        str | None, typer.Option(help="File of item attributes, joined on the item column.", rich_help_panel=_ITEMS)
    ] = None,
    min_count: Annotated[
        int,
        typer.Option(help="Rows an item needs for an id of its own, after the k-core.", rich_help_panel=_ITEMS),
    ] = 1,
    out_of_vocabulary: Annotated[
        str,
        typer.Option(help="Rows of items below --min-count: drop, or bucket (one id for all).", rich_help_panel=_ITEMS),
    ] = "drop",
    hash_buckets: Annotated[
        int | None,
        typer.Option(help="Open catalogue: an item's id is its hash in 1 to this.", rich_help_panel=_ITEMS),
    ] = None,
    max_history: Annotated[
        int | None, typer.Option(help="Keep a user's newest interactions only.", rich_help_panel=_USERS)
    ] = None,
    split: Annotated[
        str,
        typer.Option(
            help="leave_one_out, time:VALID_FROM,TEST_FROM or users:VALID_SHARE,TEST_SHARE.", rich_help_panel=_USERS
        ),
    ] = "leave_one_out",
    name: Annotated[
        str | None, typer.Option(help="Name of the data set; default: from the source.", rich_help_panel=_OUTPUT)
    ] = None,
    num_shards: Annotated[
        int | None,
        typer.Option(help="Files the users are hashed over; default: by the number of rows.", rich_help_panel=_OUTPUT),
    ] = None,
    row_group_size: Annotated[
        int, typer.Option(help="Users in a row group of a file.", rich_help_panel=_OUTPUT)
    ] = 1024,
    seed: Annotated[int, typer.Option(help="Key of the order of users inside a file.", rich_help_panel=_OUTPUT)] = 0,
    append_to: Annotated[
        str | None,
        typer.Option(
            help="Prepared directory: --out gets its interactions and the source's; it stays as it is.",
            rich_help_panel=_OUTPUT,
        ),
    ] = None,
    num_cpus: Annotated[
        int | None, typer.Option(help="Of the local Ray; default: all.", rich_help_panel=_RESOURCES)
    ] = None,
    rows_per_block: Annotated[
        int, typer.Option(help="Rows a read task aims at.", rich_help_panel=_RESOURCES)
    ] = 1_000_000,
    object_store_bytes: Annotated[
        int | None,
        typer.Option(
            help="Memory of the local Ray's object store; beyond it, blocks go to disk.", rich_help_panel=_RESOURCES
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(help="YAML file of the same keys (min_user_interactions: 3); options typed here win."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show schema, plan and estimates; write nothing.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print nothing but errors.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Turn a raw log (Parquet, CSV, JSON lines) into sequence shards with a manifest."""
    from genatt_dist.prepare_options import configure

    others = ("config", "dry_run", "quiet", "as_json")
    typed = {
        key: value
        for key, value in context.params.items()
        if key not in others and getattr(context.get_parameter_source(key), "name", "") != "DEFAULT"
    }
    options = configure(typed, config)
    if dry_run:
        from data_pipeline import dry_run as planning

        planned = planning.dry_run(options)
        if as_json:
            print(json.dumps(planned.as_data(), indent=2))
        elif not quiet:
            planning.show(planned, Console())
        return
    from data_pipeline.prepare import prepare as run
    from data_pipeline.storage import redact

    manifest, where = run(options, progress=not quiet), redact(options.out)
    if as_json:
        counts = {"users": manifest.num_users, "items": manifest.num_items, "interactions": manifest.num_interactions}
        print(json.dumps({"out": where, "name": manifest.name, **counts, "files": len(manifest.files)}, indent=2))
    elif not quiet:
        Console().print(
            f"{where}: {manifest.num_users:,} users, {manifest.num_items:,} items, {manifest.num_interactions:,} "
            f"interactions in {len(manifest.files):,} files. Next: genatt inspect {where}",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )


@app.command(
    epilog=examples("genatt inspect shards/ml-100k", "genatt inspect s3://bucket/shards --top 20 --verify --json")
)
def inspect(
    path: Annotated[str, typer.Argument(metavar="SHARDS", help="Prepared directory (any fsspec path).")],
    top: Annotated[int, typer.Option(min=0, help="How many of the most frequent items.")] = 10,
    verify: Annotated[bool, typer.Option("--verify", help="Check the sha256 of every file first.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what prepared data hold: rows by stage, split, lengths, top items, files."""
    from data_pipeline import inspection

    if verify:
        inspection.verify(path, stderr())
    found = inspection.inspect(path, top)
    if as_json:
        print(json.dumps(found.as_data(), indent=2))
    else:
        inspection.show(found, Console())
