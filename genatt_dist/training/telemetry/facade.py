"""The one object through which training tells: to metrics.jsonl, to a progress line, and to whatever else is asked for.

Rank 0 writes. Inside Ray every rank's numbers are exported as metrics of its process.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from genatt_dist.training.telemetry.background import Background
from genatt_dist.training.telemetry.ray_metrics import RayMetrics, in_ray
from genatt_dist.training.telemetry.trackers import trackers
from genatt_dist.training.telemetry.writers import JsonLines, TensorBoard, Values, Writer
from genatt_dist.training.warnings import FailureSign

_LINE_SECONDS = 60.0
_END_SECONDS, _FAILED_END_SECONDS = 15.0, 3.0  # given to writers to take what waits; a run that is stopped has no time


class Telemetry:
    """A context; on other ranks than 0 nothing is written and nothing is said."""

    def __init__(self, run: Path, title: str, total_steps: int, active: bool, first_step: int = 0) -> None:
        """first_step: updates a resumed run has behind it; what a stopped one recorded after them is forgotten, as far
        as each place of writing can forget.

        Raises GenattError where the environment asks for a server whose client is not installed.
        """
        self._active, self._lined = active, time.monotonic()
        others: dict[str, Callable[[], Writer]] = {}
        if active:
            self._log = JsonLines(run / "metrics.jsonl", first_step)
            self._console = Console(stderr=True)
            self._progress = Progress(
                TextColumn("[bold]{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[status]}"),
                TimeRemainingColumn(),
                console=self._console,
                disable=not self._console.is_terminal,
            )
            self._task: TaskID = self._progress.add_task(title, total=total_steps, status="")
            others = {"TensorBoard": lambda: TensorBoard(run / "tensorboard", first_step)} | trackers(run)
        if in_ray():
            others["Ray's metrics"] = lambda: RayMetrics(run, first_step)
        self._others = [Background(name, make, self._tell) for name, make in others.items()]
        self._writers: list[Writer] = [*([self._log] if active else []), *self._others]

    def __enter__(self) -> Telemetry:
        if self._active:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._active:
            self._progress.stop()
        deadline = time.monotonic() + (_FAILED_END_SECONDS if kind else _END_SECONDS)
        for writer in self._writers:
            writer.close(failed=kind is not None)
        for other in self._others:
            other.join(deadline)

    def advance(self, step: int, status: str | None = None) -> None:
        """Move the bar; `status` replaces the text behind it. Where no bar is drawn, it is a line a minute."""
        if not self._active:
            return
        fields = {} if status is None else {"status": status}
        self._progress.update(self._task, completed=step, **fields)  # type: ignore[arg-type]
        if status is not None and not self._console.is_terminal and time.monotonic() - self._lined > _LINE_SECONDS:
            self._lined, task = time.monotonic(), self._progress.tasks[self._task]
            left = "" if task.time_remaining is None else f", about {timedelta(seconds=int(task.time_remaining))} left"
            self.say(f"step {step:,} of {task.total:,.0f}: {status}{left}")

    def records(self) -> list[dict[str, Any]]:
        """What is in metrics.jsonl: of a resumed run, all up to its checkpoint. Empty where nothing is written."""
        return self._log.records() if self._active else []

    def record(self, kind: str, step: int, values: Values) -> None:
        """One line of metrics.jsonl; each number is a point of a curve, each list a histogram."""
        for writer in self._writers:
            writer.record(kind, step, values)

    def warn(self, step: int, sign: FailureSign) -> None:
        """A failure sign: above the bar, as a line of kind `warning`, and wherever else numbers go."""
        for writer in self._writers:
            writer.warn(step, sign)
        self._tell(f"warning: {sign.text}")

    def finish(self, step: int, performance: Mapping[str, Any]) -> None:
        """The run's performance, as a record of that kind: of its parts, `part/name`."""
        values = _flat(performance)
        if values:
            self.record("performance", step, values)

    def say(self, text: str, style: str | None = None) -> None:
        """One line above the bar."""
        if self._active:
            self._console.print(text, style=style, highlight=False, markup=False, soft_wrap=True)

    def _tell(self, text: str) -> None:
        self.say(text, style="yellow")


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, float | list[float]]:
    """Numbers and lists of numbers of a tree, by the keys that lead to them."""
    flat: dict[str, float | list[float]] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}/")
        elif isinstance(value, int | float | list):
            flat[f"{prefix}{key}"] = value
    return flat
