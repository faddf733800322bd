"""Verbs about trained runs: evaluate, recommend, compare, report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from data_pipeline.errors import GenattError
from genatt_dist.cli.app import app, examples, progress, stderr

_Inference = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE",
        help="Other choices of inference than the run's: inference, mc_samples, sampling_steps, eta, sample_blocks.",
    ),
]


@app.command(
    epilog=examples(
        "genatt evaluate runs/beauty --split test",
        "genatt evaluate runs/diffusion --split valid --json sampling_steps=10 eta=1",
    )
)
def evaluate(
    run: Annotated[Path, typer.Argument(help="Run directory.")],
    inference: _Inference = None,
    split: Annotated[str, typer.Option(help="valid or test.")] = "test",
    category: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Rank items of this category, for users whose target is one; repeatable."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Rank every user's target against the whole catalogue with the best checkpoint."""
    _check_split(split)
    from genatt_dist import runs

    runs.read_config(run)
    from genatt_dist.evaluation.run import evaluate_run

    with progress("users") as advance:
        report = evaluate_run(run, split, advance, inference or [], category or [])
    if as_json:
        print(json.dumps(report, indent=2))
        return
    for note in report["notes"]:
        stderr().print(f"note: {note}", highlight=False, markup=False, soft_wrap=True)
    from genatt_dist.evaluation.metrics import DEFINITIONS

    table = Table(title=f"{report['model']} on {split}, {report['users']:,} users, checkpoint of step {report['step']}")
    table.add_column("metric")
    table.add_column("value", justify="right")
    table.add_column("what it is", overflow="fold", style="dim")
    told: set[str] = set()
    for name, value in report["metrics"].items():
        kind = name.partition("@")[0]
        table.add_row(
            name,
            f"{value:.4f}" if abs(value) >= 1e-3 or not value else f"{value:.1e}",
            "" if kind in told else DEFINITIONS.get(kind, ""),
        )
        told.add(kind)
    Console().print(table)


@app.command(
    epilog=examples(
        "genatt recommend runs/beauty --users users.csv --k 10 --category Makeup --out top10.parquet",
        "genatt recommend runs/beauty --users histories.parquet --out top10.parquet   (with an item "
        "column: raw histories)",
    )
)
def recommend(
    run: Annotated[Path, typer.Argument(help="Run directory.")],
    users: Annotated[
        Path, typer.Option(help="Parquet or CSV: a user column (known users), or user and item columns (histories).")
    ],
    out: Annotated[Path, typer.Option(help="Parquet file to write: user_id, rank, item_id, score.")],
    k: Annotated[int, typer.Option(help="Items a user gets.")] = 10,
    category: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="List items of this category alone; repeatable: of any of them."),
    ] = None,
    category_column: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="Of --users: the categories each user wants instead.")
    ] = None,
    inference: _Inference = None,
) -> None:
    """Write the best k items for known users, or for raw histories of unknown ones."""
    from genatt_dist import runs

    runs.read_config(run)
    from genatt_dist.serving import recommend as serving
    from genatt_dist.serving.trained import load

    trained = load(run, inference or [])
    requests = serving.read_requests(users, trained, category_column)
    for note in requests.notes:
        stderr().print(f"note: {note}", highlight=False, markup=False, soft_wrap=True)
    with progress("users", len(requests.user_ids)) as advance:
        table = serving.recommend(trained, requests, k, advance, category or [])
    serving.write(table, out)
    Console().print(
        f"{out}: {table.height:,} rows for {len(requests.user_ids):,} users", highlight=False, soft_wrap=True
    )


@app.command(
    epilog=examples(
        "genatt compare runs/study/dot_product runs/study/variational",
        "genatt compare runs/a runs/b runs/c --split valid --metric recall@10 --json",
    )
)
def compare(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN RUN …", help="Evaluated runs; the first is the reference.")
    ],
    split: Annotated[str, typer.Option(help="valid or test.")] = "test",
    metric: Annotated[str, typer.Option(help="ndcg@k, recall@k or mrr.")] = "ndcg@10",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compare evaluated runs user by user: paired bootstrap, with Holm's correction over the runs."""
    _check_split(split)
    from genatt_dist.evaluation.compare import compare_runs, print_comparison

    report = compare_runs(runs, split, metric)
    if as_json:
        print(json.dumps(report, indent=2))
    else:
        print_comparison(report)


@app.command(
    epilog=examples(
        "genatt report runs/study/dot_product runs/study/variational --out runs/report",
        "genatt report runs/beauty --out runs/report --steps benchmarks/results/steps.json",
    )
)
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN …", help="Runs that were evaluated on test.")],
    out: Annotated[Path, typer.Option(help="Directory of report.json and report.html.")],
    steps: Annotated[
        Path | None, typer.Option(help="JSON file of `genatt bench steps`: adds the cost of diffusion steps.")
    ] = None,
) -> None:
    """Draw evaluated runs on one page: metrics, curves, failure signs, attention maps."""
    from genatt_dist.evaluation.collect import collect
    from genatt_dist.evaluation.report import print_table, write_report

    content, named = collect(runs, steps)
    try:
        write_report(content, named, out)
    except OSError as error:
        raise GenattError(f"cannot write {out}: {error.strerror}; choose another --out") from None
    print_table(content)
    Console().print(f"Report: {out / 'report.html'}", highlight=False, soft_wrap=True)


def _check_split(split: str) -> None:
    if split not in ("valid", "test"):
        raise GenattError(f"--split {split} is unknown: use valid or test")
