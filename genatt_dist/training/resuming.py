"""Going on from a checkpoint: any number of ranks, any ZeRO stage, the other kind of table, data that grew.

Within a kind of table and its optimizer everything is carried over, and a resumed run is the run that never stopped.
Between a replicated and a sharded table, or two optimizers of a sharded one, the rows are carried over and their
optimizer state starts anew, because it means something else; the dense model's goes on. When the vocabulary grew, the
new rows are those that a fresh table of that size has, with zero state.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from data_pipeline.errors import GenattError
from data_pipeline.storage import redact
from genatt_dist.config import RunConfig
from genatt_dist.data.sequences import Sequences
from genatt_dist.embedding.feature_options import AttributeFeature
from genatt_dist.embedding.options import ManagedCollision
from genatt_dist.embedding.table import ITEM_TABLE, TableShard, initial_rows
from genatt_dist.training.checkpoint import tensors
from genatt_dist.training.checkpoint.lineage import has_grown
from genatt_dist.training.checkpoint.progress import Progress
from genatt_dist.training.checkpoint.read import Checkpoint
from genatt_dist.training.checkpoint.store import Store
from genatt_dist.training.checkpoint.tables import dense_name, table_name, whole_table
from genatt_dist.training.engine import Engine

if TYPE_CHECKING:
    from genatt_dist.embedding.sharded import ShardedTable

_STATE = ("parameter.", "buffer.")


@dataclass(frozen=True)
class Resumed:
    """Where the run stands, and lines that say what was not carried over."""

    progress: Progress
    notes: list[str]


def newest(store: Store, group: dist.ProcessGroup | None) -> Checkpoint:
    """The newest complete checkpoint that rank 0 sees: a shared file system may show others an older one for some
    seconds. Collective. group: for what is not training; None: the one they train in.
    """
    steps = [store.complete()[-1:] if dist.get_rank() == 0 else []]
    if dist.get_world_size() > 1:
        dist.broadcast_object_list(steps, 0, group=group)
    return store.at(steps[0][0]) if steps[0] else store.newest()


def resume(
    source: Checkpoint, config: RunConfig, sequences: Sequences, engine: Engine, table: ShardedTable | None
) -> Resumed:
    """Load a checkpoint into engine and table. Collective.

    Raises GenattError when it is damaged, belongs to other data, or does not fit the model.
    """
    _verify(source)
    _check_managed(source, config)
    grown = has_grown(source, sequences.manifest, sequences.manifest_hash, sequences.path)
    progress = _continued(source, config, sequences) if grown else source.progress
    same_optimizer = _table_optimizer(source.config) == _table_optimizer(config)
    engine.load_state(_dense(source, config, engine.shapes(), grown), progress.step)
    for shard in table.shards if table else []:
        _fill(shard, source, same_optimizer)
    if table:
        table.restored()
    notes = []
    if grown:
        notes.append(
            f"data grew to {sequences.num_items:,} items since the checkpoint: rows that are new start fresh, all else "
            f"goes on; epoch {progress.epoch + 1} begins with the new data, and early stopping starts anew"
        )
    if not same_optimizer:
        notes.append(
            f"table was {_table_optimizer(source.config)}, is {_table_optimizer(config)}: its rows are carried over, "
            "its optimizer state starts anew"
        )
    return Resumed(progress, notes)


def _verify(source: Checkpoint) -> None:
    """Each rank a part of the files; what one finds is raised by all."""
    message = ""
    try:
        source.verify(dist.get_rank(), dist.get_world_size())
    except GenattError as error:
        message = str(error)
    told = [message] * dist.get_world_size()
    dist.all_gather_object(told, message)
    if found := next(filter(None, told), None):
        raise GenattError(found)


def _check_managed(source: Checkpoint, config: RunConfig) -> None:
    before, now = source.config.table.managed_collision, config.table.managed_collision
    if before != now:
        raise GenattError(
            f"checkpoint {redact(source.path)} has table.managed_collision={_shown(before)}, the configuration "
            f"{_shown(now)}: a row means another item there; go on with what it began with"
        )


def _shown(managed: ManagedCollision | None) -> str:
    return "null" if managed is None else f"{{{managed}}}"


def _continued(source: Checkpoint, config: RunConfig, sequences: Sequences) -> Progress:
    """The progress when the data changed: the epoch under way begins again, with the new data.

    What was best says nothing any more: validation has other targets, and the vocabulary is another one.
    """
    old = source.progress
    numbered = [one.name for one in config.features if isinstance(one, AttributeFeature) and one.buckets is None]
    if numbered:
        raise GenattError(
            f"features.{numbered[0]}: data that grew number an attribute's values anew, so its rows in checkpoint "
            f"{redact(source.path)} mean others; train again, with features.{numbered[0]}.buckets if data grow"
        )
    if old.epoch >= config.training.epochs:
        raise GenattError(
            f"checkpoint {redact(source.path)} has trained all of training.epochs={config.training.epochs}: raise "
            f"training.epochs to train on the new data of {redact(sequences.path)}"
        )
    return Progress(
        sequences.manifest_hash,
        old.step,
        old.epoch,
        vocabulary_hash=sequences.manifest.vocabulary.sha256,
        begun_epoch=old.epoch,
        begun_step=old.step,
        seconds=old.seconds,
        step_seconds=old.step_seconds,
        sequences=old.sequences,
    )


def _table_optimizer(config: RunConfig) -> str:
    """Two tables with the same words here have the same optimizer state."""
    if config.table.kind == "replicated":
        return f"replicated with {config.training.optimizer}"
    return f"sharded with {config.table.optimizer}"


def _dense(
    source: Checkpoint, config: RunConfig, shapes: Mapping[str, tuple[int, ...]], grown: bool
) -> dict[str, Tensor]:
    """The dense state in these shapes; rows of tables that were sharded come from their files."""
    parameters = {name.split(".", 1)[1] for name in shapes}
    state = source.dense(lambda name: name.split(".", 1)[1] in parameters)
    moments = sorted({name.split(".", 1)[0] for name in state if not name.startswith(_STATE)})
    for name, shape in shapes.items():
        parameter = name.split(".", 1)[1]
        table = table_name(parameter)
        if name not in state and table is not None and source.table_shape(table) == shape:
            state[name] = whole_table(source, table, shape)
            state |= {f"{moment}.{parameter}": torch.zeros(shape) for moment in moments}
        elif grown and table == ITEM_TABLE and name in state and len(state[name]) < shape[0]:
            known, new = len(state[name]), shape[0] - len(state[name])
            fresh = initial_rows(known, new, shape[1], config.table.init_std, config.training.seed)
            state[name] = torch.cat((state[name], fresh))
            for moment in moments:
                old = state[f"{moment}.{parameter}"]
                state[f"{moment}.{parameter}"] = torch.cat((old, old.new_zeros(new, shape[1])))
    if strangers := sorted(name for name in shapes if name not in state or state[name].shape != shapes[name]):
        raise GenattError(
            f"checkpoint {redact(source.path)} does not fit the model: {len(strangers)} tensors differ, the first is "
            f"{strangers[0]}; go on with the configuration, data and version that it began with"
        )
    return state


def _fill(shard: TableShard, source: Checkpoint, same_optimizer: bool) -> None:
    """Rows, and state where it means the same, of what lies on this rank."""
    if any(source.table_shape(shard.name)):
        source.read_shard(shard, same_optimizer)
        return
    name = f"parameter.{dense_name(shard.name)}"
    if name not in source.dense_entries:
        raise GenattError(
            f"checkpoint {redact(source.path)} has no table {shard.name}; go on with the configuration it began with"
        )
    entry, columns = source.dense_entries[name], slice(shard.first_column, shard.first_column + shard.rows.shape[1])
    known = max(0, min(len(shard.rows), entry.shape[0] - shard.first_row))
    for first, count in tensors.spans(known, entry.row_bytes, shard.first_row):
        block = source.dense_rows(name, first, count)
        shard.rows[first - shard.first_row :][:count].copy_(block[:, columns])
