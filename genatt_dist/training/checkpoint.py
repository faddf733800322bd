"""Checkpoints: one directory a step, safetensors and JSON only, published by writing COMPLETE last.

    step-00000120/
        dense.safetensors              fp32 parameters, buffers, optimizer moments by name (ZeRO's parts gathered)
        table-00000.safetensors …      rows of a sharded table and their optimizer state, with the first row's number
        progress.json                  cursor, counters, best result so far, what data it belongs to
        config.yaml                    the run's configuration
        COMPLETE                       sha256 of every other file

Nothing in it depends on the number of ranks or the ZeRO stage that wrote it, and nothing read is a pickle.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from data_pipeline.errors import GenattError

_COMPLETE = "COMPLETE"


@dataclass
class Progress:
    """Where a run stands: `epoch` and `batch` are the cursor of the next global batch, `step` counts updates.

    seconds: since the start, validation and checkpoints included; step_seconds: in training steps alone.
    """

    manifest_hash: str
    step: int = 0
    epoch: int = 0
    batch: int = 0
    seconds: float = 0.0
    step_seconds: float = 0.0
    sequences: int = 0
    stale: int = 0
    best_metric: float = -1.0
    best_step: int = -1
    best_metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class TablePart:
    """Rows first_row … of a table on one rank, with optimizer state of the same rows. rows: [V, D]."""

    first_row: int
    rows: Tensor
    optimizer: dict[str, Tensor]


def folder(run: Path, step: int) -> Path:
    """Where the checkpoint of update `step` lies."""
    return run / "checkpoints" / f"step-{step:08d}"


def newest(run: Path) -> Path:
    """The newest complete checkpoint. Raises GenattError when there is none."""
    sealed = (path.parent for path in (run / "checkpoints").glob(f"step-*/{_COMPLETE}"))
    complete = sorted(path for path in sealed if not path.suffix)  # `.tmp` is sealed just before it gets its name
    if not complete:
        raise GenattError(f"{run} holds no complete checkpoint: start the run again in another directory")
    return complete[-1]


def best(run: Path) -> Path:
    """The checkpoint with the best validation metric, as the newest one says; before any validation the newest."""
    latest = newest(run)
    step = read_progress(latest).best_step
    path = folder(run, step)
    if step >= 0 and not (path / _COMPLETE).exists():
        raise GenattError(f"{run}: its best checkpoint {path.name} is missing; bring it back, or train again")
    return path if step >= 0 else latest


def write_table(path: Path, rank: int, part: TablePart) -> None:
    """Write one rank's rows into an unpublished checkpoint."""
    tensors = {"rows": part.rows} | {f"optimizer.{name}": value for name, value in part.optimizer.items()}
    contiguous = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    save_file(contiguous, path / f"table-{rank:05d}.safetensors", metadata={"first_row": str(part.first_row)})


def write_dense(path: Path, tensors: dict[str, Tensor], progress: Progress, config: str) -> None:
    """Write the dense state, the progress and the configuration (YAML) into an unpublished checkpoint."""
    save_file(tensors, path / "dense.safetensors")
    (path / "progress.json").write_text(json.dumps(asdict(progress), indent=2))
    (path / "config.yaml").write_text(config)


def prepare(final: Path) -> Path:
    """A fresh directory to write into; `publish` renames it."""
    path = final.with_suffix(".tmp")
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    return path


def publish(final: Path, keep: set[Path]) -> None:
    """Seal what was written and give it its name; only then delete older checkpoints that are not in `keep`."""
    path = final.with_suffix(".tmp")
    sums = {file.name: _sha256(file) for file in sorted(path.iterdir())}
    (path / _COMPLETE).write_text(json.dumps(sums, indent=2))
    for written in (*path.iterdir(), path):  # on disk before an older one goes, also if the power fails
        _sync(written)
    path.rename(final)  # a step is saved once; a second time would be an error here, before anything is lost
    _sync(final.parent)
    for old in final.parent.glob("step-*"):
        if old not in keep | {final}:
            shutil.rmtree(old, ignore_errors=True)


def verify(path: Path) -> None:
    """Raise GenattError naming the first file whose bytes are not those that were written."""
    try:
        sums = json.loads((path / _COMPLETE).read_text())
    except ValueError as error:
        raise GenattError(
            f"checkpoint {path}: {_COMPLETE} is damaged: {error}; remove this checkpoint to use an older one"
        ) from None
    for name, expected in sums.items():
        if not (path / name).exists():
            raise GenattError(f"checkpoint {path}: {name} is missing; remove this checkpoint to use an older one")
        if (found := _sha256(path / name)) != expected:
            raise GenattError(
                f"checkpoint {path}: {name} has sha256 {found[:12]}…, {expected[:12]}… was written; remove "
                "this checkpoint to use an older one"
            )


def read_progress(path: Path) -> Progress:
    """Where the run stood when the checkpoint was written."""
    try:
        return Progress(**json.loads((path / "progress.json").read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise GenattError(
            f"checkpoint {path}: cannot read progress.json: {error}; remove this checkpoint to use an older one"
        ) from None


def read_dense(path: Path) -> dict[str, Tensor]:
    """All tensors of the dense state by name."""
    with safe_open(path / "dense.safetensors", framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)


def read_table(path: Path, first_row: int, num_rows: int, with_optimizer: bool = True) -> TablePart | None:
    """Rows first_row … first_row + num_rows − 1, whichever ranks wrote them; None when the checkpoint has no sharded
    table.
    """
    pieces: dict[str, list[Tensor]] = {}
    for file_path in sorted(path.glob("table-*.safetensors")):
        with safe_open(file_path, framework="pt") as file:
            begin = int(file.metadata()["first_row"])
            size = file.get_slice("rows").get_shape()[0]
            low, high = max(first_row, begin) - begin, min(first_row + num_rows, begin + size) - begin
            if low >= high:
                continue
            for name in file.keys():  # noqa: SIM118 (not a dict)
                if name == "rows" or with_optimizer:
                    pieces.setdefault(name, []).append(file.get_slice(name)[low:high])
    if not pieces:
        return None
    whole = {name: torch.cat(parts) for name, parts in pieces.items()}
    if len(whole["rows"]) != num_rows:
        raise GenattError(
            f"checkpoint {path} holds {len(whole['rows'])} of the table rows {first_row}..{first_row + num_rows - 1}"
        )
    rows = whole.pop("rows")
    return TablePart(first_row, rows, {name.removeprefix("optimizer."): value for name, value in whole.items()})


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
