"""What a writer of telemetry is, and the two that every run has: metrics.jsonl, the source of truth, and TensorBoard.

A record is a kind ("train", "valid", …), the update it stands at, and values by name: numbers, or lists of numbers that
are drawn as histograms.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch.utils.tensorboard import SummaryWriter

from genatt_dist.training.warnings import FailureSign

Values = Mapping[str, float | list[float]]


class Writer(Protocol):
    """Where numbers go. Called from one thread, in the order of the run."""

    def record(self, kind: str, step: int, values: Values) -> None: ...

    def warn(self, step: int, sign: FailureSign) -> None: ...

    def close(self, failed: bool) -> None:
        """The run has ended, or `failed`; nothing is called after this."""


def scalars(kind: str, values: Values) -> dict[str, float]:
    """The numbers of a record by `kind/name`."""
    return {f"{kind}/{name}": value for name, value in values.items() if not isinstance(value, list)}


def histograms(kind: str, values: Values) -> dict[str, list[float]]:
    """The lists of a record by `kind/name`, without what has no place in a histogram, where anything is left."""
    lists = {f"{kind}/{name}": value for name, value in values.items() if isinstance(value, list)}
    finite = {name: [number for number in numbers if math.isfinite(number)] for name, numbers in lists.items()}
    return {name: numbers for name, numbers in finite.items() if numbers}


class JsonLines:
    """A line of JSON for each record, whole in the file when `record` returns."""

    def __init__(self, path: Path, first_step: int) -> None:
        """first_step: records of later updates are dropped, and lines that a crash cut off: they are made again."""
        self._path = path
        if path.exists():
            kept = [json.dumps(record) + "\n" for record in self.records() if record["step"] <= first_step]
            temporary = path.with_suffix(".tmp")
            temporary.write_text("".join(kept))
            temporary.rename(path)
        self._file = path.open("a", buffering=1)

    def records(self) -> list[dict[str, Any]]:
        """The whole records of the file."""
        records = []
        for line in self._path.read_text().splitlines():
            with suppress(ValueError):
                record = json.loads(line)
                if isinstance(record, dict) and "step" in record:
                    records.append(record)
        return records

    def record(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        self._file.write(json.dumps({"kind": kind, "step": step, "time": round(time.time(), 3), **values}) + "\n")

    def warn(self, step: int, sign: FailureSign) -> None:
        facts = {"sign": sign.name, "block": sign.block, "value": sign.value, "threshold": sign.threshold}
        self.record("warning", step, facts | {"text": sign.text})

    def close(self, failed: bool) -> None:
        self._file.close()


class TensorBoard:
    """Curves and histograms in a directory of events."""

    def __init__(self, folder: Path, first_step: int) -> None:
        """first_step: TensorBoard shows nothing that an earlier process wrote of later updates."""
        self._board = SummaryWriter(str(folder), purge_step=first_step + 1)

    def record(self, kind: str, step: int, values: Values) -> None:
        for name, value in scalars(kind, values).items():
            self._board.add_scalar(name, value, step)
        for name, numbers in histograms(kind, values).items():
            self._board.add_histogram(name, np.array(numbers), step)

    def warn(self, step: int, sign: FailureSign) -> None:
        self._board.add_text("warnings", sign.text, step)

    def close(self, failed: bool) -> None:
        self._board.close()
