"""What a preparation shows on stderr: a bar a stage while it runs, a table of all stages at the end, and what it took.

On a terminal the bars move. Elsewhere (a file, CI, a job's log) a stage is one line at its end, one for each of its
notes, and one every `LINE_SECONDS` while it lasts.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich import filesize
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from data_pipeline.format import LedgerEntry
from data_pipeline.memory import MemoryUse

LINE_SECONDS = 30.0


@dataclass(frozen=True)
class Usage:
    """What a run took beside the stages: seconds until Ray ran (0: it ran already), bytes spilled (None: not known)."""

    ray_seconds: float = 0.0
    spilled_bytes: int | None = None
    memory: MemoryUse | None = None


@dataclass
class Stage:
    """A running stage; `advance` tells how far it is."""

    name: str
    stages: "Stages"
    task: TaskID
    steps: int
    rows_in: int = 0
    rows_out: int = 0
    bytes: int = 0
    steps_done: int = 0
    last_note: str = ""
    seconds: float = 0.0
    began: float = field(default_factory=lambda: time.perf_counter())
    said: float = field(default_factory=lambda: time.perf_counter())

    def advance(self, rows: int, steps: int = 1, bytes: int = 0) -> None:
        """`steps` more steps are done, with `rows` more rows, for which `bytes` more were read or written."""
        self.rows_out += rows
        self.bytes += bytes
        self.steps_done += steps
        self.seconds = time.perf_counter() - self.began
        self.stages.show(self)

    def note(self, text: str) -> None:
        """Says what the stage is at: beside its bar, or in a line of its own."""
        self.last_note = text
        self.stages.note(self)

    @property
    def rate(self) -> float:
        """Rows out a second."""
        return self.rows_out / self.seconds if self.seconds else 0.0

    @property
    def byte_rate(self) -> float:
        """Bytes a second."""
        return self.bytes / self.seconds if self.seconds else 0.0


class Stages:
    """The stages of one run; silent unless `enabled`."""

    def __init__(self, enabled: bool) -> None:
        self.console = Console(stderr=True, quiet=not enabled)
        self.live = enabled and self.console.is_terminal
        self.progress = Progress(
            TextColumn("{task.description:<10}"),
            BarColumn(bar_width=12),
            TextColumn("{task.fields[rows]:>12,} rows {task.fields[rate]:>10,.0f} rows/s {task.fields[speed]}"),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", style="dim", markup=False),
            console=self.console,
            disable=not self.live,
        )
        self.done: list[Stage] = []
        self.usage: Usage | None = None

    def __enter__(self) -> "Stages":
        return self

    def __exit__(self, *_: object) -> None:
        if self.progress.live.is_started:  # stopping prints an empty line; an error before any stage is the only line
            self.progress.stop()

    @contextmanager
    def stage(self, name: str, rows_in: int = 0, steps: int = 1) -> Iterator[Stage]:
        """A stage of `steps` steps, from here to the end of the block."""
        self.progress.start()
        task = self.progress.add_task(name, total=steps, rows=0, rate=0.0, speed="", note="")
        stage = Stage(name, self, task, steps, rows_in=rows_in)
        yield stage
        stage.seconds = time.perf_counter() - stage.began
        stage.rows_in = stage.rows_in or stage.rows_out
        stage.steps_done, stage.last_note = steps, ""
        if self.live:
            self.show(stage)
        else:
            self._line(stage, f"{stage.seconds:,.1f} s")
        self.done.append(stage)

    def note(self, stage: Stage) -> None:
        """Shows the stage's last note: beside its bar, or in a line of its own."""
        if self.live:
            self.show(stage)
        else:
            self._print(stage, stage.last_note)

    def show(self, stage: Stage) -> None:
        """Moves the stage's bar; without a terminal, prints a line when there was none for long."""
        if self.live:
            speed = f"{_size(stage.byte_rate):>8}/s" if stage.bytes else ""
            fields = {"rows": stage.rows_out, "rate": stage.rate, "speed": speed, "note": stage.last_note}
            self.progress.update(stage.task, completed=stage.steps_done, **fields)  # type: ignore[arg-type]
        elif time.perf_counter() - stage.said >= LINE_SECONDS:
            left = stage.seconds * (stage.steps / stage.steps_done - 1) if stage.steps_done else None
            eta = "" if left is None else f", ETA {left:,.0f} s"
            self._line(stage, f"{stage.seconds:,.0f} s, step {stage.steps_done:,} of {stage.steps:,}{eta}")

    def summary(self, title: str, ledger: Sequence[LedgerEntry] = ()) -> None:
        """Prints the table of all finished stages, with what `ledger` says of their rows, and the usage below it."""
        self.progress.stop()
        table = Table(title=title, title_justify="left")
        for heading in ("stage", "rows in", "rows out", "dropped", "seconds", "rows/s", "MB/s"):
            table.add_column(heading, justify="left" if heading in ("stage", "dropped") else "right")
        for entry, stage in _joined(ledger, self.done):
            table.add_row(*_cells(entry, stage))
        self.console.print(table)
        for line in usage_lines(self.usage) if self.usage else []:
            self.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def _line(self, stage: Stage, times: str) -> None:
        speed = f", {_size(stage.byte_rate)}/s" if stage.bytes else ""
        self._print(stage, f"{stage.rows_out:,} rows, {stage.rate:,.0f} rows/s{speed}, {times}")

    def _print(self, stage: Stage, text: str) -> None:
        stage.said = time.perf_counter()
        self.console.print(f"{stage.name:<10} {text}", highlight=False, markup=False, soft_wrap=True)


def dropped_text(entry: LedgerEntry) -> str:
    """`12 user_too_short, 3 item_too_rare`; reasons that dropped nothing are left out."""
    reasons = [f"{rows:,} {reason}" for reason, rows in entry.dropped.items() if rows]
    return ", ".join([*reasons, *([f"+{entry.added:,} of the parent"] if entry.added else [])])


def usage_lines(usage: Usage) -> list[str]:
    """Ray's start, what it spilled, and the peak of memory, each in words."""
    theirs = usage.spilled_bytes is None
    spilled = "unknown (Ray was not started by this run)" if theirs else _size(usage.spilled_bytes or 0)
    ray = f"ready after {usage.ray_seconds:.1f} s (not in the table)" if usage.ray_seconds else "ran already"
    lines = [f"Ray {ray}; spilled to disk: {spilled}"]
    if memory := usage.memory:
        roles = ", ".join(f"{role} {_size(size)}" for role, size in memory.roles.items())
        count = f"{len(memory.processes)} processes{', without those of that Ray' if theirs else ''}"
        lines.append(f"Peak memory ({memory.measure} of {count}): {_size(memory.peak)}; by role: {roles}")
    return lines


def _joined(
    ledger: Sequence[LedgerEntry], stages: Sequence[Stage]
) -> Iterator[tuple[LedgerEntry | None, Stage | None]]:
    """Ledger and stages side by side by name, each in its own order; either may hold what the other does not."""
    entries = list(ledger)
    for stage in stages:
        place = next((at for at, entry in enumerate(entries) if entry.stage == stage.name), None)
        if place is None:
            yield None, stage
            continue
        yield from ((entry, None) for entry in entries[:place])
        yield entries[place], stage
        del entries[: place + 1]
    yield from ((entry, None) for entry in entries)


def _cells(entry: LedgerEntry | None, stage: Stage | None) -> tuple[str, ...]:
    rows = entry or stage
    name = entry.stage if entry else stage.name if stage else ""
    dropped = dropped_text(entry) if entry else ""
    counts = (f"{rows.rows_in:,}", f"{rows.rows_out:,}") if rows else ("", "")
    if stage is None:
        return (name, *counts, dropped, "", "", "")
    speed = f"{stage.byte_rate / 1e6:,.1f}" if stage.bytes else ""
    return (name, *counts, dropped, f"{stage.seconds:.2f}", f"{stage.rate:,.0f}", speed)


def _size(count: float) -> str:
    return filesize.decimal(int(count))
