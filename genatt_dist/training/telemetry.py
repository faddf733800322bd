"""What a run tells while it runs: metrics.jsonl, TensorBoard curves, and one progress line on rank 0.

With MLFLOW_TRACKING_URI in the environment (and the `mlflow` extra installed) the same numbers go to that server.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil
import torch
import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter

from data_pipeline.errors import GenattError


class Telemetry:
    """Writes on rank 0; on other ranks every call does nothing."""

    def __init__(self, run: Path, title: str, total_steps: int, active: bool, first_step: int = 0) -> None:
        """first_step: updates a resumed run has behind it; what a stopped one recorded after them is forgotten."""
        self._active = active
        if not active:
            return
        _forget_after(run / "metrics.jsonl", first_step)
        self._file = (run / "metrics.jsonl").open("a", buffering=1)
        self._board = SummaryWriter(str(run / "tensorboard"), purge_step=first_step + 1)
        self._mlflow = _mlflow(run)
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

    def __enter__(self) -> Telemetry:
        if self._active:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._active:
            self._progress.stop()
            self._board.close()
            if self._mlflow:
                self._mlflow.end_run("FAILED" if kind else "FINISHED")
            self._file.close()

    def advance(self, step: int, status: str | None = None) -> None:
        """Move the bar; `status` replaces the text behind it."""
        if self._active:
            fields = {} if status is None else {"status": status}
            self._progress.update(self._task, completed=step, **fields)  # type: ignore[arg-type]

    def record(self, kind: str, step: int, values: dict[str, float]) -> None:
        """One line of metrics.jsonl and one point of each curve."""
        if not self._active:
            return
        self._file.write(json.dumps({"kind": kind, "step": step, "time": round(time.time(), 3), **values}) + "\n")
        for name, value in values.items():
            self._board.add_scalar(f"{kind}/{name}", value, step)
        if self._mlflow:
            names = {name.replace("@", "_at_"): value for name, value in values.items()}  # MLflow refuses the sign
            self._mlflow.log_metrics({f"{kind}/{name}": value for name, value in names.items()}, step=step)

    def say(self, text: str) -> None:
        """One line above the bar."""
        if self._active:
            self._console.print(text, highlight=False, markup=False, soft_wrap=True)


def _forget_after(path: Path, step: int) -> None:
    """Drop the records of later steps (and lines that a crash cut off): the resumed run makes them again."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines(keepends=True):
        with suppress(ValueError):
            if json.loads(line)["step"] <= step:
                kept.append(line.rstrip("\n") + "\n")
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(kept))
    temporary.rename(path)


def _mlflow(run: Path) -> Any:
    """The mlflow module with a run started, or None where nobody asked for it."""
    if not os.environ.get("MLFLOW_TRACKING_URI"):
        return None
    try:
        import mlflow
    except ImportError:
        raise GenattError(
            "MLFLOW_TRACKING_URI is set but mlflow is not installed: pip install 'genatt-dist[mlflow]'"
        ) from None
    mlflow.start_run(run_name=run.name)
    mlflow.log_dict(yaml.safe_load((run / "config.yaml").read_text()), "config.json")
    return mlflow


def write_environment(run: Path, device: torch.device) -> None:
    """environment.json: versions and hardware of this run. No variables of the environment: they may hold
    credentials.
    """
    packages = ("torch", "torchrec", "deepspeed", "ray", "pyarrow", "numpy", "genatt-dist")
    environment: dict[str, Any] = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "cpu_count": os.cpu_count(),
        "threads_per_rank": torch.get_num_threads(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "command": " ".join(Path(part).name if index == 0 else part for index, part in enumerate(sys.argv)),
    }
    (run / "environment.json").write_text(json.dumps(environment, indent=2))
