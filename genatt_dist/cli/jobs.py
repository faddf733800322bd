"""Verbs about Ray jobs: submit; jobs list, logs, stop."""

from __future__ import annotations

import json
import sys
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from data_pipeline.errors import GenattError
from data_pipeline.redaction import redact
from genatt_dist.cli.app import app, examples, stderr

if TYPE_CHECKING:
    from ray.job_submission import JobDetails

    from jobs.client import Client

jobs_app = typer.Typer(help="Jobs of a Ray cluster: list, follow and stop them.", no_args_is_help=True)
app.add_typer(jobs_app, name="jobs")
_DETACHED = 130
_Address = Annotated[
    str | None,
    typer.Option(
        metavar="URL",
        help="The cluster's dashboard; default: RAY_API_SERVER_ADDRESS, else http://127.0.0.1:8265.",
    ),
]
_Id = Annotated[str, typer.Argument(metavar="ID", help="Id of the job, as `genatt jobs list` shows it.")]
_Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command(
    epilog=examples(
        "genatt submit pipeline configs/pipeline.yaml --address http://head:8265 --run s3://bucket/runs/beauty "
        "--env AWS_ACCESS_KEY_ID --env AWS_SECRET_ACCESS_KEY",
        "genatt submit train configs/beauty_dot_product.yaml world_size=16 data.path=s3://bucket/shards "
        "--run s3://bucket/runs/b --detach",
    )
)
def submit(
    job: Annotated[str, typer.Argument(metavar="JOB", help="prepare, train, evaluate, benchmark or pipeline.")],
    config: Annotated[
        str | None, typer.Argument(metavar="CONFIG", help="YAML file; evaluate does without one.")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Overrides, e.g. train.training.epochs=3.")
    ] = None,
    run: Annotated[
        str | None,
        typer.Option(help="Run directory that all nodes see, or fsspec URL; the job's results, and what it resumes."),
    ] = None,
    out: Annotated[str | None, typer.Option(help="Of prepare, in place of --run: directory or URL to create.")] = None,
    address: _Address = None,
    env: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Variable that the job gets from this environment; repeatable."),
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN", help="Path or name in the checkout that the job does not need; repeatable."),
    ] = None,
    entrypoint_num_cpus: Annotated[
        float, typer.Option(min=0, help="CPUs reserved for the job's driver; 0: it runs on the head node.")
    ] = 0.0,
    timeout: Annotated[
        float | None, typer.Option(min=0, metavar="SECONDS", help="Follow the job so long; then it goes on alone.")
    ] = None,
    detach: Annotated[bool, typer.Option("--detach", help="Print the job's id and do not follow it.")] = False,
) -> None:
    """Run a job on a Ray cluster and follow it. The same command again follows it, or goes on after its end.

    Exit code 0: the job ended well; 75: it was stopped and the same command goes on; 1: it failed; 2: it was not
    submitted; 130: Ctrl-C or --timeout, the job goes on.
    """
    given = [*([config] if config else []), *(overrides or [])]
    file = Path(given.pop(0)) if given and "=" not in given[0] else None
    from jobs.options import check_kind

    check_kind(job)  # before Ray is imported, which takes seconds
    where = _place(job, run, out)
    from jobs import client as api
    from jobs import packaging
    from jobs import submit as jobs

    wanted = jobs.job_of(job, file, given, where, env or [], entrypoint_num_cpus)
    package = packaging.survey(packaging.checkout(), exclude or [])
    client = api.connect(address)
    say = stderr()
    told = jobs.submit(client, wanted, package, lambda line: say.print(line, highlight=False, soft_wrap=True))
    if told.attached:
        say.print(f"{told.id} is at work on this run already: following it", highlight=False, soft_wrap=True)
    if detach:
        print(told.id)
        say.print(f"Follow it: genatt jobs logs {told.id} --follow{_at(address)}", highlight=False, soft_wrap=True)
        return
    ended = _follow(client, told.id, address, timeout)
    api.check_ended(ended, jobs.resubmission(sys.argv[1:]))


@jobs_app.command("list", epilog=examples("genatt jobs list --address http://head:8265", "genatt jobs list --json"))
def list_jobs(address: _Address = None, as_json: _Json = False) -> None:
    """All jobs of the cluster, newest first."""
    from jobs import client as api

    rows = [_row(job, api.seconds(job)) for job in api.jobs(api.connect(address))]
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    table = Table()
    for name in ("id", "job", "run", "status", "started", "seconds", "exit code"):
        table.add_column(name, justify="right" if name in ("seconds", "exit code") else "left", overflow="fold")
    for row in rows:
        table.add_row(*("" if value is None else str(value) for value in row.values()))
    Console().print(table)


@jobs_app.command(
    epilog=examples(
        "genatt jobs logs genatt-train-beauty-1a2b3c4d-1", "genatt jobs logs genatt-train-beauty-1a2b3c4d-1 --follow"
    )
)
def logs(
    job_id: _Id,
    follow: Annotated[bool, typer.Option("--follow", help="Until the job's end; exit code as of submit.")] = False,
    address: _Address = None,
) -> None:
    """A job's log."""
    from jobs import client as api

    client = api.connect(address)
    api.details(client, job_id)
    if follow:
        api.check_ended(_follow(client, job_id, address, None), "submit it again")
        return
    with api.asking(f"read the log of {job_id}"):
        sys.stdout.write(client.get_job_logs(job_id))


@jobs_app.command(
    epilog=examples(
        "genatt jobs stop genatt-train-beauty-1a2b3c4d-1",
        "genatt jobs stop genatt-train-beauty-1a2b3c4d-1 --wait --address http://head:8265",
    )
)
def stop(
    job_id: _Id,
    wait: Annotated[bool, typer.Option("--wait", help="Until it has ended: a training writes a checkpoint.")] = False,
    timeout: Annotated[float, typer.Option(min=0, metavar="SECONDS", help="How long --wait waits.")] = 600.0,
    address: _Address = None,
) -> None:
    """End a job as a preemption would: its training finishes a step and writes a checkpoint."""
    from jobs import client as api

    found = api.stop(api.connect(address), job_id, timeout if wait else None)
    Console().print(f"{job_id}: {found.status.value}", highlight=False, soft_wrap=True)


def _place(job: str, run: str | None, out: str | None) -> str:
    if out is not None and (job != "prepare" or run is not None):
        raise GenattError(f"--out {out}: it is the place of job prepare, in place of --run: use --run for job {job}")
    if not (where := run or out):
        raise GenattError(f"--{'out' if job == 'prepare' else 'run'} is missing: name a directory or URL for job {job}")
    return where


def _follow(client: Client, job_id: str, address: str | None, timeout: float | None) -> JobDetails:
    """The log on stdout and a line of status on stderr until the job's end; Ctrl-C and the time limit leave the job."""
    try:
        found = _shown(client, job_id, timeout)
    except KeyboardInterrupt:
        found = None
    if found is None:
        stderr().print(
            f"{job_id} goes on. Follow it: genatt jobs logs {job_id} --follow{_at(address)}; stop it: genatt jobs stop "
            f"{job_id}{_at(address)}",
            highlight=False,
            soft_wrap=True,
        )
        sys.exit(_DETACHED)
    return found


def _shown(client: Client, job_id: str, timeout: float | None) -> JobDetails | None:
    from jobs import client as api

    console = Console()
    if console.is_terminal:
        columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
        with Progress(*columns, console=console, transient=True) as shown:
            task = shown.add_task(job_id)

            def write(text: str) -> None:
                console.print(text.rstrip("\n"), markup=False, highlight=False, soft_wrap=True)

            return api.follow(client, job_id, write, lambda status: _describe(shown, task, job_id, status), timeout)
    last = ""

    def tell(status: str) -> None:
        nonlocal last
        if status != last:
            stderr().print(f"{job_id}: {status}", highlight=False, soft_wrap=True)
            last = status

    def plain(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    return api.follow(client, job_id, plain, tell, timeout)


def _describe(shown: Progress, task: Any, job_id: str, status: str) -> None:
    shown.update(task, description=f"{job_id} {status}")


def _row(job: JobDetails, seconds: float | None) -> dict[str, Any]:
    known = job.metadata or {}
    started = job.start_time and datetime.fromtimestamp(job.start_time / 1000).isoformat(" ", "seconds")
    return {
        "id": job.submission_id,
        "job": known.get("job"),
        "run": known.get("run"),
        "status": job.status.value,
        "started": started,
        "seconds": seconds and round(seconds),
        "exit_code": job.driver_exit_code,
    }


def _at(address: str | None) -> str:
    return f" --address {redact(address)}" if address else ""
