"""Verbs that train: train, checkpoints, study, quickstart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from genatt_dist.cli.app import app, examples, stderr, study

_HOSTS = "Several hosts"


@app.command(
    epilog=examples(
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
    launcher: Annotated[
        str | None,
        typer.Option(
            help="process, torchrun, deepspeed, slurm or ray; default by --hostfile, --rendezvous, world_size."
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest complete checkpoint in --run.")
    ] = False,
    hostfile: Annotated[
        Path | None, typer.Option(help="deepspeed: the hosts, as lines `name slots=N`.", rich_help_panel=_HOSTS)
    ] = None,
    ssh: Annotated[
        str, typer.Option(help="What reaches them: ssh, pdsh, openmpi, mpich or impi.", rich_help_panel=_HOSTS)
    ] = "ssh",
    ssh_port: Annotated[int | None, typer.Option(help="Port of their sshd.", rich_help_panel=_HOSTS)] = None,
    nnodes: Annotated[
        int, typer.Option(help="torchrun: hosts on which this command is given.", min=1, rich_help_panel=_HOSTS)
    ] = 1,
    rendezvous: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", help="torchrun: where they meet, on the first.", rich_help_panel=_HOSTS),
    ] = None,
    node_rank: Annotated[
        int | None,
        typer.Option(
            help="torchrun: place of this host; default: 0 where HOST is, else by arrival.", rich_help_panel=_HOSTS
        ),
    ] = None,
    master_port: Annotated[
        int | None, typer.Option(help="Port of the first rank; default: a free one.", rich_help_panel=_HOSTS)
    ] = None,
    start_seconds: Annotated[
        float, typer.Option(help="How long hosts or tasks wait for one another.", min=1, rich_help_panel=_HOSTS)
    ] = 300,
) -> None:
    """Train one model into a run directory."""
    from genatt_dist import config as configuration
    from genatt_dist import runs
    from genatt_dist.launch.hosts import Hosts

    hosts = Hosts(hostfile, ssh, ssh_port, nnodes, node_rank, rendezvous, master_port, start_seconds)
    summary = runs.train(configuration.load(config, overrides or []), run, launcher, resume, hosts)
    if not summary:  # the first host, or task, tells it
        return
    valid, training = summary["valid"], summary["train"]
    if performance := summary.get("performance"):
        from genatt_dist.training.performance_table import performance_table

        Console().print(performance_table(performance))
    Console().print(
        f"{run}: valid ndcg@10 {valid['ndcg@10']:.4f} after {training['epochs']} epochs, {training['seconds']:.0f} s, "
        f"{training['sequences_per_second']:,.0f} sequences/s. Next: genatt evaluate {run} --split test",
        highlight=False,
        soft_wrap=True,
    )


@app.command(
    epilog=examples(
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


@study.command(
    epilog=examples(
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
    run(config, out, names, overrides or [], jobs, out_file, stderr())


@app.command(epilog=examples("genatt quickstart", "genatt quickstart --data my_log.parquet --out runs/mine"))
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

    run(data, out, launcher, overrides or [], stderr())
