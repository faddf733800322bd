"""A trained model in one process: the best checkpoint's dense model with all item rows, whatever ranks and tables
trained it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from data_pipeline.errors import GenattError
from data_pipeline.storage import redact
from genatt_dist import runs
from genatt_dist.config import RunConfig, for_inference
from genatt_dist.data.sequences import Sequences
from genatt_dist.embedding.features import replicated, with_features
from genatt_dist.embedding.table import ItemTable
from genatt_dist.model.backbone import Backbone
from genatt_dist.training.checkpoint.files import COMPLETE
from genatt_dist.training.checkpoint.read import Checkpoint
from genatt_dist.training.checkpoint.store import Store
from genatt_dist.training.checkpoint.tables import map_of_items, table_name, whole_table
from genatt_dist.training.engine import select_device
from genatt_dist.training.step import DenseModel


@dataclass(frozen=True)
class Trained:
    """Backbone and table in evaluation mode, the configuration they were trained with and the data they belong to."""

    config: RunConfig
    backbone: Backbone
    table: ItemTable
    sequences: Sequences
    device: torch.device
    step: int


def load(run: Path, inference: Sequence[str] = ()) -> Trained:
    """Read the best checkpoint of `run`, or the bundle that `genatt checkpoints --export` made, and its data set.

    inference: choices other than the run's, as `sampling_steps=10` (config.for_inference). Raises GenattError naming
    what is missing or does not fit.
    """
    config = for_inference(runs.read_config(run), inference)
    bundle = (run / COMPLETE).exists()
    source = Checkpoint.open(str(run)) if bundle else Store.of(run, config.training.checkpoint).best()
    source.verify()
    sequences = Sequences.read(
        config.data.path, verify=True, prefetch_bytes=config.data.prefetch_bytes, features=config.features
    )
    progress = source.progress
    if progress.manifest_hash != sequences.manifest_hash:
        raise GenattError(
            f"{run} was trained on data with manifest {progress.manifest_hash[:12]}…, {config.data.path} now has "
            f"{sequences.manifest_hash[:12]}…: prepare the same data again, or train again"
        )
    managed = config.table.managed_collision
    num_rows = managed.rows if managed else sequences.num_items
    model = DenseModel(replicated(config), num_rows, sequences.features.num_rows)
    wanted = {name: value.shape for name, value in model.state_dict().items()}
    stored = source.dense(lambda name: name.startswith(("parameter.", "buffer.")) and name.split(".", 1)[1] in wanted)
    state = {name.split(".", 1)[1]: value for name, value in stored.items()}
    for name in wanted.keys() - state.keys():
        table = table_name(name)
        if table is not None and source.table_shape(table) == wanted[name]:
            state[name] = whole_table(source, table, wanted[name])
    if strangers := sorted(name for name in wanted if name not in state or state[name].shape != wanted[name]):
        raise GenattError(
            f"checkpoint {redact(source.path)} does not fit the model of this version: {len(strangers)} tensors "
            f"differ, the first is {strangers[0]}; evaluate it with the version that trained it, or train again"
        )
    model.load_state_dict({name: state[name] for name in wanted})
    device = select_device()
    model.to(device).eval()
    assert model.items is not None
    items: ItemTable = model.items
    if managed:
        from genatt_dist.embedding.managed import ManagedRows, ManagedTable

        rows = ManagedRows(managed, sequences.num_items, device)
        rows.load(map_of_items(source))
        items = ManagedTable(items, rows)
    items = with_features(items, model.features)
    return Trained(config, model.backbone, items, sequences, device, progress.step)
