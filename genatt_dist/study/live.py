"""The queue on a console: a line an arm that moves on a terminal, a line an event elsewhere."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from rich.console import Console
from rich.live import Live
from rich.table import Table

from genatt_dist.evaluation.report_data import HEADLINE, pretty
from genatt_dist.study.paths import round_of, run_of
from genatt_dist.study.queue import FAILED, RUNNING, Job

_COLOURS = {"done": "green", "failed": "red", "running": "cyan", "waiting": "dim"}


class Standing(NamedTuple):
    """How far an arm is: where (a round, of an arm whose noise is matched), epochs validated, best validation."""

    round: int
    epoch: int
    best: float


class View:
    """Call it with the jobs, inside `with`."""

    def __init__(self, out: Path, console: Console) -> None:
        self._out, self._console = out, console
        self._told: dict[str, tuple[str, Standing]] = {}
        self._live = Live(console=console, refresh_per_second=1) if console.is_terminal else None

    def __enter__(self) -> View:
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()

    def __call__(self, jobs: Sequence[Job]) -> None:
        standings = {job.name: standing(self._out, job.name) for job in jobs}
        if self._live:
            self._live.update(_table(jobs, standings))
            return
        for job in jobs:
            now = (job.state, standings[job.name])
            if self._told.get(job.name) != now:
                self._told[job.name] = now
                text = "  ".join(part for part in _cells(job, standings[job.name]) if part)
                self._console.print(text, highlight=False, markup=False, soft_wrap=True)


def standing(out: Path, arm: str) -> Standing:
    """Read from the log of the arm's run, or of the latest round that trains it."""
    run, number = run_of(out, arm), 0
    while not run_of(out, arm).exists() and round_of(out, arm, number + 1).exists():
        number += 1
        run = round_of(out, arm, number)
    epoch, best = 0, 0.0
    try:
        lines = (run / "metrics.jsonl").read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    for line in lines:
        if not line.startswith('{"kind": "valid"'):
            continue
        try:
            values = json.loads(line)
        except ValueError:
            continue  # being written
        epoch, best = int(values["epoch"]), max(best, float(values[HEADLINE]))
    return Standing(number, epoch, best)


def _table(jobs: Sequence[Job], standings: dict[str, Standing]) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in ("arm", "state", "epoch", f"best valid {pretty(HEADLINE)}", "elapsed", ""):
        table.add_column(name, justify="left" if name in ("arm", "state", "") else "right", overflow="fold")
    for job in jobs:
        name, state, epoch, *rest, note = _cells(job, standings[job.name])
        note = note.replace("[", r"\[")
        table.add_row(name, f"[{_COLOURS[state]}]{state}[/]", epoch.removeprefix("epoch "), *rest, note)
    return table


def _cells(job: Job, at: Standing) -> list[str]:
    minutes, seconds = divmod(int(job.seconds), 60)
    elapsed = f"{minutes}:{seconds:02d}" if job.started else ""
    epoch = f"epoch {at.epoch}" if at.epoch else ""
    note = (
        job.error or "" if job.state == FAILED else (f"round {at.round}" if at.round and job.state == RUNNING else "")
    )
    return [pretty(job.name), job.state, epoch, f"{at.best:.4f}" if at.epoch else "", elapsed, note]
