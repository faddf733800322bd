"""Run directories: what is checked before a run exists, how it is created, and how it is started.

A mistake that can be known from config and data is told here, before any process starts and before anything is written.
"""

from __future__ import annotations

import json
import re
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from data_pipeline.errors import GenattError
from data_pipeline.storage import check_access, redact
from genatt_dist import config as configuration
from genatt_dist.config import RunConfig
from genatt_dist.embedding.options import check_device
from genatt_dist.launch.hosts import Hosts
from genatt_dist.launch.launchers import check_launcher, launch
from genatt_dist.launch.places import Place, device_type, take
from genatt_dist.training.stopped import STOPPED

CONFIG = "config.yaml"
SUMMARY = "summary.json"
# What may differ when a run is resumed: neither a checkpoint nor the schedule of rates depends on it.
_RESUMABLE = {
    "world_size",
    "data.prefetch_bytes",
    "table.sharding",
    "training.zero_stage",
    "training.max_seconds",
    "training.patience",
    "training.stop_seconds",
    "training.silence_seconds",
    "training.collective_seconds",
    "ray.min_workers",
    "ray.max_failures",
    "ray.cpus_per_worker",
    "ray.gpus_per_worker",
    "ray.placement",
    "training.checkpoint_every",
    "training.checkpoint.background",
    "training.checkpoint.keep_last",
    "training.checkpoint.keep_best",
}


def train(
    config: RunConfig, run: Path, launcher: str | None = None, resume: bool = False, hosts: Hosts | None = None
) -> dict[str, Any]:
    """Create `run` (or go on with it), train under `launcher`, and return what `summary.json` holds.

    launcher: of LAUNCHERS; default: what `hosts` asks for, else `process` for one rank and `deepspeed` for more.
    hosts: where the ranks run; default: here. Where the same command is given on several hosts, or to Slurm's tasks,
    the first makes the run directory and has the summary; the others return {}.
    Raises GenattError; a run that could not be started leaves nothing behind.
    """
    if scheme := re.match(r"[a-z][a-z0-9+]+:/", str(run)):  # Path has made one slash of two
        raise GenattError(
            f"--run {scheme[0]}/… is a URL: `genatt submit train` takes one; name a directory here, and a URL as "
            "training.checkpoint.path"
        )
    hosts = hosts or Hosts()
    launcher = launcher or hosts.launcher or ("process" if config.world_size == 1 else "deepspeed")
    check_launcher(launcher, config.world_size)
    if config.data.feed == "ray" and launcher != "ray":
        raise GenattError(
            f"data.feed=ray with launcher={launcher}: Ray Data gives rows to the workers of Ray Train alone; use "
            "--launcher ray, or data.feed=loader"
        )
    if launcher == "ray":
        hosts.check(launcher, config.world_size)
        return _train(config, run, launcher, resume, None)
    with take(launcher, hosts, config.world_size) as place:
        if place.first:
            return _train(config, run, launcher, resume, place)
        launch(run, launcher, config.training, place, resume)
        return {}


def _train(config: RunConfig, run: Path, launcher: str, resume: bool, place: Place | None) -> dict[str, Any]:
    """`train` in the process that makes the run directory. place: None where Ray places the ranks."""
    before = None
    if resume:
        before = check_same(config, run)
    elif run.exists():
        raise GenattError(f"run directory {run} exists: choose another --run, or go on with it by --resume")
    else:
        _check_free(config, run)
    check_data(config, place.device if place else None)
    create(config, run)
    try:
        if place is None:
            from genatt_dist.launch.ray_train import fit

            return fit(config, run, resume)
        launch(run, launcher, config.training, place, resume)
        summary: dict[str, Any] = json.loads((run / SUMMARY).read_text())
    except BaseException:
        if not resume and not _has_trained(run):  # nothing to keep
            shutil.rmtree(run, ignore_errors=True)
        if before is not None:
            _put_back(*before, run)
        raise
    return summary


def _has_trained(run: Path) -> bool:
    """Whether a run that ended has told of an update, saved one before it came to tell, or left the batch of a loss
    that was no number, which its error names.
    """
    from genatt_dist.training.nonfinite import NONFINITE

    if (run / NONFINITE).exists():
        return True
    with suppress(OSError, ValueError):
        if json.loads((run / STOPPED).read_text())["checkpoint"] is not None:
            return True
    log = run / "metrics.jsonl"
    return log.exists() and log.stat().st_size > 0


def check_data(config: RunConfig, device: str | None = None) -> None:
    """Whether the shards are whole (sha256), every rank gets a sequence of every batch, a user to validate on
    and, of a sharded table, a row; and whether the ranks' device has the kernels that the table asks for.

    device: `cpu` or `cuda`; default: that of ranks on this host.
    """
    import torch

    from genatt_dist.data.batches import TrainingBatches
    from genatt_dist.data.sequences import Sequences
    from genatt_dist.embedding.table import check_shards
    from genatt_dist.evaluation.categories import categories_of

    sequences = Sequences.read(
        config.data.path, verify=True, prefetch_bytes=config.data.prefetch_bytes, features=config.features
    )
    TrainingBatches.plan(sequences, config.data, config.training).check(config.world_size, config.training.epochs)
    if (held_out := int(sequences.has_target("valid").sum())) < config.world_size:
        raise GenattError(
            f"{sequences.manifest.name}: {held_out} users have an item to validate on (split "
            f"{sequences.manifest.split.rule}), fewer than world_size={config.world_size}: prepare it with more users, "
            "or another split"
        )
    categories_of(sequences, config.evaluation.category_column, torch.device("cpu"))
    if config.table.kind == "sharded":
        check_device(config.table, device or device_type(config.world_size))
        if config.table.sharding != "table_wise":
            managed = config.table.managed_collision
            check_shards((managed.rows if managed else sequences.num_items) + 1, config.world_size)


def read_config(run: Path) -> RunConfig:
    """The resolved configuration of an existing run."""
    if not (run / CONFIG).exists():
        raise GenattError(f"{run} is not a run directory (no {CONFIG} in it): name one that `genatt train` made")
    return configuration.load(run / CONFIG)


def create(config: RunConfig, run: Path) -> None:
    """Make a run directory, or write its configuration anew. Raises GenattError."""
    try:
        run.mkdir(parents=True, exist_ok=True)
        temporary = run / f".{CONFIG}"
        temporary.write_text(configuration.dump(config))
        temporary.rename(run / CONFIG)
    except OSError as error:
        raise GenattError(f"cannot write run directory {run}: {error.strerror}; choose another --run") from None


def _check_free(config: RunConfig, run: Path) -> None:
    """Whether nothing lies where a fresh run will write checkpoints: it would remove what it takes for its own."""
    if config.training.checkpoint.path is None:
        return
    from genatt_dist.training.checkpoint.store import Store

    check_access(config.training.checkpoint.path)
    if Store.of(run, config.training.checkpoint).contents():
        raise GenattError(
            f"training.checkpoint.path={redact(config.training.checkpoint.path)} holds checkpoints already: choose "
            "another one for each run, or go on with that run by --resume"
        )


def _put_back(before: RunConfig, newest: int, run: Path) -> None:
    """Without a checkpoint newer than that of update `newest`, the run is still what it was, and its data too."""
    from genatt_dist.training.checkpoint.store import Store

    with suppress(GenattError):  # what failed is the news
        if Store.of(run, before.training.checkpoint).complete()[-1:] == [newest]:
            create(before, run)


def check_same(config: RunConfig, run: Path) -> tuple[RunConfig, int]:
    """Whether the run's newest checkpoint is whole and can go on under `config`: what may differ is in `_RESUMABLE`.
    Returns the configuration until now, and the update of that checkpoint.

    Also the table's kind and optimizer, with all that belongs to them (only its rows are carried over), and the data,
    where they are the same elsewhere or grew from what the checkpoint knows (then for more epochs, too).
    """
    from data_pipeline.format import load_manifest, manifest_hash
    from genatt_dist.training.checkpoint.lineage import has_grown
    from genatt_dist.training.checkpoint.store import Store

    before = read_config(run) if (run / CONFIG).exists() else config  # which is told below to have no checkpoint
    if before.training.checkpoint.path is not None:
        check_access(before.training.checkpoint.path)
    newest = Store.of(run, before.training.checkpoint).newest()
    newest.verify()
    ours, theirs = _flat(config.model_dump()), _flat(before.model_dump())
    may = set(_RESUMABLE)
    if (config.table.kind, config.table.optimizer) != (before.table.kind, before.table.optimizer):
        may |= {key for key in ours if key.startswith("table.") and key != "table.init_std"}
    path = config.data.path
    if has_grown(newest, load_manifest(path), manifest_hash(path), path):
        may.add("training.epochs")
    if path != before.data.path:
        may.add("data.path")
    changed = sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key) and key not in may)
    if changed:
        shown = ", ".join(f"{key} was {theirs.get(key)!r}, is {ours.get(key)!r}" for key in changed[:3])
        raise GenattError(
            f"--resume of {run} with another configuration: {shown}; only {', '.join(sorted(may))} may change"
        )
    return before, newest.progress.step


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
