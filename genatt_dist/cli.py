"""`genatt`: one verb, one function call. torch, deepspeed and ray are imported inside the verbs that need them."""

from __future__ import annotations

import json
import signal
import sys
import threading
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from data_pipeline.errors import GenattError

app = typer.Typer(
    help="Train generative-attention recommenders: TorchRec tables, DeepSpeed dense layers, Ray Data shards.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
study = typer.Typer(help="Train and compare several models under one protocol.", no_args_is_help=True)
app.add_typer(study, name="study")
bench = typer.Typer(help="Measure what things cost on this machine.", no_args_is_help=True)
app.add_typer(bench, name="bench")
_USER_ERROR, _INTERRUPTED, _TERMINATED = 2, 130, 143


def _examples(*lines: str) -> str:
    return "Examples:\n\n" + "\n\n".join(f"  $ {line}" for line in lines)


_COLUMNS, _CLEANING, _ITEMS = "Columns", "Cleaning", "Items"
_USERS, _OUTPUT, _RESOURCES = "Users and split", "Output", "Resources (they do not change the result)"


@app.command(
    epilog=_examples(
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
    epilog=_examples("genatt inspect shards/ml-100k", "genatt inspect s3://bucket/shards --top 20 --verify --json")
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
        inspection.verify(path, _stderr())
    found = inspection.inspect(path, top)
    if as_json:
        print(json.dumps(found.as_data(), indent=2))
    else:
        inspection.show(found, Console())


@app.command(
    epilog=_examples(
        "genatt train configs/beauty_dot_product.yaml --run runs/beauty",
        "genatt train configs/quickstart.yaml world_size=2 model.attention.type=diffusion --run runs/d "
        "--launcher deepspeed",
    )
)
def train(
    config: Annotated[Path, typer.Argument(help="YAML file of the run.")],
    run: Annotated[Path, typer.Option(help="Run directory to create.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Overrides, e.g. training.epochs=3.")
    ] = None,
    launcher: Annotated[str | None, typer.Option(help="process, torchrun or deepspeed; default by world_size.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest complete checkpoint in --run.")
    ] = False,
) -> None:
    """Train one model into a run directory."""
    from genatt_dist import config as configuration
    from genatt_dist import runs

    summary = runs.train(configuration.load(config, overrides or []), run, launcher, resume)
    valid, training = summary["valid"], summary["train"]
    Console().print(
        f"{run}: valid ndcg@10 {valid['ndcg@10']:.4f} after {training['epochs']} epochs, {training['seconds']:.0f} s, "
        f"{training['sequences_per_second']:,.0f} sequences/s. Next: genatt evaluate {run} --split test",
        highlight=False,
        soft_wrap=True,
    )


_Inference = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE",
        help="Other choices of inference than the run's: inference, mc_samples, sampling_steps, eta, sample_blocks.",
    ),
]


@app.command(
    epilog=_examples(
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

    with _progress("users") as advance:
        report = evaluate_run(run, split, advance, inference or [], category or [])
    if as_json:
        print(json.dumps(report, indent=2))
        return
    for note in report["notes"]:
        _stderr().print(f"note: {note}", highlight=False, markup=False, soft_wrap=True)
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
    epilog=_examples(
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
        _stderr().print(f"note: {note}", highlight=False, markup=False, soft_wrap=True)
    with _progress("users", len(requests.user_ids)) as advance:
        table = serving.recommend(trained, requests, k, advance, category or [])
    serving.write(table, out)
    Console().print(
        f"{out}: {table.height:,} rows for {len(requests.user_ids):,} users", highlight=False, soft_wrap=True
    )


@app.command(
    epilog=_examples(
        "genatt checkpoints runs/beauty --verify",
        "genatt checkpoints runs/beauty --export bundles/beauty",
    )
)
def checkpoints(
    run: Annotated[Path, typer.Argument(help="Run directory.")],
    verify: Annotated[bool, typer.Option("--verify", help="Check the sha256 of every file.")] = False,
    export: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="Write the best one (or --step) for one process: safetensors and config."),
    ] = None,
    step: Annotated[int | None, typer.Option(help="Only the checkpoint of this step.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List a run's checkpoints, check them, or export one for serving."""
    from genatt_dist import runs

    runs.read_config(run)
    from genatt_dist.training.checkpoint import inventory

    found = inventory.checkpoints(run, verify, export, step)
    if as_json:
        print(json.dumps(found.as_data(), indent=2))
    else:
        inventory.show(found, Console())


@app.command(
    epilog=_examples(
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
    epilog=_examples(
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


@study.command(
    epilog=_examples(
        "genatt study quality --out runs/study --out-file benchmarks/results/quality_beauty.json",
        "genatt study quality --out runs/short --arms dot_product,variational --jobs 2 training.epochs=4",
    )
)
def quality(
    out: Annotated[
        Path, typer.Option(help="Directory of the arms' runs and of the results; go on by naming it again.")
    ],
    config: Annotated[Path, typer.Option(help="YAML file of the study.")] = Path("configs/study_quality.yaml"),
    jobs: Annotated[int, typer.Option(help="Arms trained at one time; the cores are shared out.")] = 1,
    arms: Annotated[str, typer.Option(help="Names with commas; default: all arms of the study.")] = "",
    out_file: Annotated[Path | None, typer.Option(help="Where the results' JSON is copied.")] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Overrides of the study's base run.")
    ] = None,
) -> None:
    """Train, evaluate and compare every arm of a study: a queue that may be stopped and started again."""
    from genatt_dist.study.run import quality as run

    names = [name.strip() for name in arms.split(",") if name.strip()]
    run(config, out, names, overrides or [], jobs, out_file, _stderr())


@bench.command(
    "steps",
    epilog=_examples(
        "genatt bench steps --out benchmarks/results/steps_cpu.json",
        "genatt bench steps --quick --select mode=training --select form=factor --out steps.json",
    ),
)
def bench_steps(
    out: Annotated[Path, typer.Option(help="JSON file to write; its figures go beside it as a PNG.")],
    quick: Annotated[bool, typer.Option("--quick", help="A small grid of small batches.")] = False,
    select: Annotated[
        list[str] | None, typer.Option(metavar="FIELD=A,B", help="Rows to measure, e.g. max_len=50; repeatable.")
    ] = None,
    steps: Annotated[str, typer.Option(help="T of training, with commas; default 1 to 200.")] = "",
    sampling_steps: Annotated[str, typer.Option(help="S of serving, with commas; default 1 to 200.")] = "",
    max_len: Annotated[str, typer.Option(help="n, with commas; default 50,100,200.")] = "",
    training_batch: Annotated[
        int | None, typer.Option(min=1, help="Sequences of a batch at n=50, fewer at longer n; default 256.")
    ] = None,
    serving_batch: Annotated[
        int | None, typer.Option(min=1, help="Users of a batch at n=50, fewer at longer n; default 1024.")
    ] = None,
    items: Annotated[int, typer.Option(min=10, help="Items of the catalogue.")] = 12_101,
    rounds: Annotated[int, typer.Option(min=5, help="Timings of a row.")] = 5,
    variant_seconds: Annotated[float, typer.Option(min=0, help="Seconds the timings of one row may take.")] = 10.0,
    memory_limit: Annotated[
        int | None, typer.Option(min=1, metavar="MIB", help="Memory a row may take; default: most that is free.")
    ] = None,
) -> None:
    """Time, latency and memory of generated attention against its diffusion steps, beside dot product."""
    from benchmarks.steps.run import run

    extents = {"steps": steps, "sampling_steps": sampling_steps, "max_lens": max_len}
    batches = {"training_batch": training_batch, "serving_batch": serving_batch}
    careful = {"num_items": items, "rounds": rounds, "variant_seconds": variant_seconds, "memory_mb": memory_limit}
    run(out, quick, select or [], extents, batches, careful, _stderr())


@app.command(
    epilog=_examples(
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


@app.command(epilog=_examples("genatt quickstart", "genatt quickstart --data my_log.parquet --out runs/mine"))
def quickstart(
    data: Annotated[str, typer.Option(help="Your own log instead of ml-100k (anything `prepare` takes).")] = "ml-100k",
    out: Annotated[
        Path, typer.Option(help="Directory of shards, runs and report; an earlier quickstart there is replaced.")
    ] = Path("runs/quickstart"),
    launcher: Annotated[str, typer.Option(help="torchrun or deepspeed.")] = "deepspeed",
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Overrides of configs/quickstart.yaml.")
    ] = None,
) -> None:
    """Raw log → shards → three models on two ranks → evaluation → report."""
    from genatt_dist.quickstart import quickstart as run

    run(data, out, launcher, overrides or [], _stderr())


@app.command(epilog=_examples("genatt doctor", "genatt doctor --json"))
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


def main() -> None:
    """Entry point: a user's mistake is one line and exit code 2, Ctrl-C 130 and SIGTERM 143; a traceback is a bug."""
    terminated = threading.Event()

    def terminate(*_: object) -> None:
        terminated.set()
        raise KeyboardInterrupt  # all is tidied up as after Ctrl-C; Ray knows no other exception of a handler

    signal.signal(signal.SIGTERM, terminate)
    try:
        code = app(standalone_mode=False)
    except GenattError as error:
        code = _tell(str(error))
    except Exception as error:
        # A wrong option. Its class has no public name that all versions of typer share, but the method is theirs alone.
        if not hasattr(error, "format_message"):
            raise
        if not (message := " ".join(error.format_message().split())):
            sys.exit(_USER_ERROR)  # no arguments at all: the help was printed
        context = getattr(error, "ctx", None)
        code = _tell(f"{message.rstrip('.')}: see {context.command_path if context else 'genatt'} --help")
    if code == _INTERRUPTED:
        _stderr().print("stopped", style="red")
        code = _TERMINATED if terminated.is_set() else code
    sys.exit(code)


def _check_split(split: str) -> None:
    if split not in ("valid", "test"):
        raise GenattError(f"--split {split} is unknown: use valid or test")


def _tell(message: str) -> int:
    _stderr().print(f"error: {message}", style="red", highlight=False, markup=False, soft_wrap=True)
    return _USER_ERROR


def _stderr() -> Console:
    return Console(stderr=True)


def _progress(unit: str, total: int | None = None) -> Any:
    """A context that gives a function to move a progress bar on stderr by some units."""
    from contextlib import contextmanager

    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    @contextmanager
    def bar() -> Any:
        console = _stderr()
        columns = (
            BarColumn(),
            TextColumn("{task.completed:,.0f} " + unit),
            TextColumn("{task.speed:,.0f}/s"),
            TimeElapsedColumn(),
        )
        with Progress(*columns, console=console, disable=not console.is_terminal) as shown:
            task = shown.add_task("", total=total)
            yield lambda amount: shown.update(task, advance=amount)

    return bar()


if __name__ == "__main__":
    main()
