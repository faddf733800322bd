"""A trained model in one process: the best checkpoint's dense model with all item rows, whatever ranks and tables
trained it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from data_pipeline.errors import GenattError
from genatt_dist import runs
from genatt_dist.config import RunConfig, TableConfig, for_inference
from genatt_dist.data.sequences import Sequences
from genatt_dist.embedding.table import ReplicatedTable
from genatt_dist.model.backbone import Backbone
from genatt_dist.training import checkpoint
from genatt_dist.training.engine import select_device
from genatt_dist.training.step import DenseModel


@dataclass(frozen=True)
class Trained:
    """Backbone and table in evaluation mode, the configuration they were trained with and the data they belong to."""

    config: RunConfig
    backbone: Backbone
    table: ReplicatedTable
    sequences: Sequences
    device: torch.device
    step: int


def load(run: Path, inference: Sequence[str] = ()) -> Trained:
    """Read the best checkpoint of `run` and its data set.

    inference: choices other than the run's, as `sampling_steps=10` (config.for_inference). Raises GenattError naming
    what is missing or does not fit.
    """
    config = for_inference(runs.read_config(run), inference)
    path = checkpoint.best(run)
    checkpoint.verify(path)
    sequences = Sequences.read(config.data.path, verify=True, prefetch_bytes=config.data.prefetch_bytes)
    progress = checkpoint.read_progress(path)
    if progress.manifest_hash != sequences.manifest_hash:
        raise GenattError(
            f"{run} was trained on data with manifest {progress.manifest_hash[:12]}…, {config.data.path} now has "
            f"{sequences.manifest_hash[:12]}…: prepare the same data again, or train again"
        )
    model = DenseModel(
        config.model_copy(update={"table": TableConfig(init_std=config.table.init_std)}), sequences.num_items
    )
    tensors = checkpoint.read_dense(path)
    state = {
        name.split(".", 1)[1]: value for name, value in tensors.items() if name.startswith(("parameter.", "buffer."))
    }
    rows = checkpoint.read_table(path, 0, sequences.num_items + 1, with_optimizer=False)
    if rows is not None:
        state["items.weight"] = rows.rows
    wanted = {name: value.shape for name, value in model.state_dict().items()}
    if strangers := sorted(name for name in wanted if name not in state or state[name].shape != wanted[name]):
        raise GenattError(
            f"checkpoint {path} does not fit the model of this version: {len(strangers)} tensors differ, the first "
            f"is {strangers[0]}; evaluate it with the version that trained it, or train again"
        )
    model.load_state_dict({name: state[name] for name in wanted})
    device = select_device()
    model.to(device).eval()
    assert model.items is not None
    return Trained(config, model.backbone, model.items, sequences, device, progress.step)
