"""One line a stage on stderr while it runs, and a table of all stages at the end."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table


@dataclass
class Stage:
    """A running stage; `advance` tells how far it is."""

    name: str
    progress: Progress
    task: TaskID
    began: float = field(default_factory=time.perf_counter)
    rows_in: int = 0
    rows_out: int = 0
    seconds: float = 0.0

    def advance(self, rows: int, steps: int = 1) -> None:
        """`steps` more steps are done, with `rows` more rows."""
        self.rows_out += rows
        self.seconds = time.perf_counter() - self.began
        self.progress.update(self.task, advance=steps, rows=self.rows_out, rate=self.rate)

    @property
    def rate(self) -> float:
        """Rows out a second."""
        return self.rows_out / self.seconds if self.seconds else 0.0


class Stages:
    """The stages of one run; silent unless `enabled`."""

    def __init__(self, enabled: bool) -> None:
        self.console = Console(stderr=True, quiet=not enabled)
        self.progress = Progress(
            TextColumn("{task.description:<10}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[rows]:>14,} rows {task.fields[rate]:>14,.0f} rows/s"),
            TimeElapsedColumn(),
            console=self.console,
            disable=not enabled,
        )
        self.done: list[Stage] = []

    def __enter__(self) -> "Stages":
        return self

    def __exit__(self, *_: object) -> None:
        if self.progress.live.is_started:  # stopping prints an empty line; an error before any stage is the only line
            self.progress.stop()

    @contextmanager
    def stage(self, name: str, rows_in: int = 0, steps: int = 1) -> Iterator[Stage]:
        """A stage of `steps` steps, from here to the end of the block."""
        self.progress.start()
        stage = Stage(name, self.progress, self.progress.add_task(name, total=steps, rows=0, rate=0.0), rows_in=rows_in)
        yield stage
        stage.seconds = time.perf_counter() - stage.began
        stage.rows_in = stage.rows_in or stage.rows_out
        self.progress.update(stage.task, completed=steps, rate=stage.rate)
        self.done.append(stage)

    def summary(self, title: str) -> None:
        """Prints the table of all finished stages."""
        table = Table(title=title, title_justify="left")
        for heading in ("stage", "rows in", "rows out", "dropped", "seconds", "rows/s"):
            table.add_column(heading, justify="left" if heading == "stage" else "right")
        for stage in self.done:
            dropped = f"{stage.rows_in - stage.rows_out:,}"
            rows = (f"{stage.rows_in:,}", f"{stage.rows_out:,}", dropped)
            table.add_row(stage.name, *rows, f"{stage.seconds:.2f}", f"{stage.rate:,.0f}")
        self.progress.stop()
        self.console.print(table)
