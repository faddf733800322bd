"""Run directories: what is checked before a run exists, how it is created, and how it is started.

A mistake that can be known from config and data is told here, before any process starts and before anything is written.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from data_pipeline.errors import GenattError
from genatt_dist import config as configuration
from genatt_dist.config import RunConfig
from genatt_dist.launch.launchers import check_launcher, launch

CONFIG = "config.yaml"
SUMMARY = "summary.json"
# What may differ when a run is resumed: neither a checkpoint nor the schedule of rates depends on it.
_RESUMABLE = {"world_size", "training.zero_stage", "training.max_seconds", "training.patience", "data.prefetch_bytes"}


def train(config: RunConfig, run: Path, launcher: str | None = None, resume: bool = False) -> dict[str, Any]:
    """Create `run` (or go on with it), train under `launcher`, and return what `summary.json` holds.

    launcher: `process`, `torchrun` or `deepspeed`; default: `process` for one rank, else `deepspeed`.
    Raises GenattError; a run that could not be started leaves nothing behind.
    """
    launcher = launcher or ("process" if config.world_size == 1 else "deepspeed")
    check_launcher(launcher, config.world_size)
    if resume:
        _check_same(config, run)
    elif run.exists():
        raise GenattError(f"run directory {run} exists: choose another --run, or go on with it by --resume")
    check_data(config)
    _create(config, run)
    try:
        launch(run, launcher, config.world_size, resume)
        summary: dict[str, Any] = json.loads((run / SUMMARY).read_text())
    except BaseException:
        log = run / "metrics.jsonl"
        if not resume and not (log.exists() and log.stat().st_size):  # it never trained: nothing to keep
            shutil.rmtree(run, ignore_errors=True)
        raise
    return summary


def check_data(config: RunConfig) -> None:
    """Whether the shards are whole (sha256), every rank gets a sequence of every batch, a user to validate on
    and, of a sharded table, a row.
    """
    from genatt_dist.data.batches import TrainingBatches
    from genatt_dist.data.sequences import Sequences
    from genatt_dist.embedding.table import check_shards

    sequences = Sequences.read(config.data.path, verify=True, prefetch_bytes=config.data.prefetch_bytes)
    TrainingBatches.plan(sequences, config.data, config.training).check(config.world_size, config.training.epochs)
    if (held_out := int(sequences.has_target("valid").sum())) < config.world_size:
        raise GenattError(
            f"{sequences.manifest.name}: {held_out} users have an item to validate on (split "
            f"{sequences.manifest.split.rule}), fewer than world_size={config.world_size}: prepare it with more users, "
            "or another split"
        )
    if config.table.kind == "sharded":
        check_shards(sequences.num_items + 1, config.world_size)


def read_config(run: Path) -> RunConfig:
    """The resolved configuration of an existing run."""
    if not (run / CONFIG).exists():
        raise GenattError(f"{run} is not a run directory (no {CONFIG} in it): name one that `genatt train` made")
    return configuration.load(run / CONFIG)


def _create(config: RunConfig, run: Path) -> None:
    try:
        run.mkdir(parents=True, exist_ok=True)
        temporary = run / f".{CONFIG}"
        temporary.write_text(configuration.dump(config))
        temporary.rename(run / CONFIG)
    except OSError as error:
        raise GenattError(f"cannot write run directory {run}: {error.strerror}; choose another --run") from None


def _check_same(config: RunConfig, run: Path) -> None:
    from genatt_dist.training import checkpoint

    checkpoint.verify(checkpoint.newest(run))
    ours, theirs = _flat(config.model_dump()), _flat(read_config(run).model_dump())
    changed = sorted(
        key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key) and key not in _RESUMABLE
    )
    if changed:
        shown = ", ".join(f"{key} was {theirs.get(key)!r}, is {ours.get(key)!r}" for key in changed[:3])
        raise GenattError(
            f"--resume of {run} with another configuration: {shown}; only {', '.join(sorted(_RESUMABLE))} may change"
        )


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
