"""What a run tells while it runs: metrics.jsonl, TensorBoard curves, and one progress line on rank 0.

With MLFLOW_TRACKING_URI in the environment (and the `mlflow` extra installed) the same numbers go to that server.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import psutil
import torch
import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter

from data_pipeline.errors import GenattError
from genatt_dist.training.warnings import FailureSign


class Telemetry:
    """Writes on rank 0; on other ranks every call does nothing."""

    def __init__(self, run: Path, title: str, total_steps: int, active: bool, first_step: int = 0) -> None:
        """first_step: updates a resumed run has behind it; what a stopped one recorded after them is forgotten."""
        self._active = active
        if not active:
            return
        self._path = run / "metrics.jsonl"
        _forget_after(self._path, first_step)
        self._file = self._path.open("a", buffering=1)
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

    def records(self) -> list[dict[str, Any]]:
        """What is in metrics.jsonl: of a resumed run, all up to its checkpoint. Empty where nothing is written."""
        return _read(self._path) if self._active else []

    def record(self, kind: str, step: int, values: Mapping[str, float | list[float]]) -> None:
        """One line of metrics.jsonl; each number is a point of a curve, each list a histogram on the board."""
        if not self._active:
            return
        self._write(kind, step, values)
        numbers = {f"{kind}/{name}": value for name, value in values.items() if not isinstance(value, list)}
        for name, value in numbers.items():
            self._board.add_scalar(name, value, step)
        for name, vector in values.items():
            if isinstance(vector, list) and (finite := [value for value in vector if math.isfinite(value)]):
                self._board.add_histogram(f"{kind}/{name}", np.array(finite), step)  # others have no bin
        if self._mlflow:  # which refuses the sign @
            self._mlflow.log_metrics({name.replace("@", "_at_"): value for name, value in numbers.items()}, step=step)

    def warn(self, step: int, sign: FailureSign) -> None:
        """A failure sign: above the bar, as a line of kind `warning`, and as a text on the board."""
        if not self._active:
            return
        facts = {"sign": sign.name, "block": sign.block, "value": sign.value, "threshold": sign.threshold}
        self._write("warning", step, facts | {"text": sign.text})
        self._board.add_text("warnings", sign.text, step)
        self.say(f"warning: {sign.text}", style="yellow")
        if self._mlflow:
            self._mlflow.set_tag(f"warning.{sign.name}", f"step {step}: {sign.text}")

    def say(self, text: str, style: str | None = None) -> None:
        """One line above the bar."""
        if self._active:
            self._console.print(text, style=style, highlight=False, markup=False, soft_wrap=True)

    def _write(self, kind: str, step: int, facts: Mapping[str, Any]) -> None:
        self._file.write(json.dumps({"kind": kind, "step": step, "time": round(time.time(), 3), **facts}) + "\n")


def _forget_after(path: Path, step: int) -> None:
    """Drop the records of later steps (and lines that a crash cut off): the resumed run makes them again."""
    if not path.exists():
        return
    kept = [json.dumps(record) + "\n" for record in _read(path) if record["step"] <= step]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(kept))
    temporary.rename(path)


def _read(path: Path) -> list[dict[str, Any]]:
    """The whole records of a log."""
    records = []
    for line in path.read_text().splitlines():
        with suppress(ValueError):
            record = json.loads(line)
            if isinstance(record, dict) and "step" in record:
                records.append(record)
    return records


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
