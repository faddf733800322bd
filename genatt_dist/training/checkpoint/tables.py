"""One table under two names: among the dense parameters where it is replicated, else a table of its own.

Legend: V rows, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from data_pipeline.errors import GenattError
from data_pipeline.storage import redact
from genatt_dist.embedding.table import ITEM_TABLE, MAP_TABLE, TableShard
from genatt_dist.training.checkpoint.read import Checkpoint

MAP_BUFFER = f"buffer.{MAP_TABLE}"  # of managed collision, in an exported bundle


def dense_name(table: str) -> str:
    """The dense model's parameter with the rows of a table, where that table is replicated."""
    return "items.weight" if table == ITEM_TABLE else f"features.tables.{table}_table.weight"


def table_name(parameter: str) -> str | None:
    """The table whose rows a parameter of the dense model has; None for all others."""
    if parameter == dense_name(ITEM_TABLE):
        return ITEM_TABLE
    table = parameter.removeprefix("features.tables.").removesuffix("_table.weight")
    return table if parameter == dense_name(table) else None


def whole_table(source: Checkpoint, table: str, shape: tuple[int, ...]) -> Tensor:
    """All rows [V, D] of a sharded table, without its optimizer state."""
    rows_VD = torch.empty(shape)
    source.read_shard(TableShard(table, 0, 0, rows_VD, {}), with_optimizer=False)
    return rows_VD


def map_of_items(source: Checkpoint) -> Tensor:
    """The map of managed collision as `ManagedRows.load` takes it, from a run's checkpoint or a bundle."""
    if any(shape := source.table_shape(MAP_TABLE)):
        state = torch.empty(shape, dtype=torch.int64)
        source.read_shard(TableShard(MAP_TABLE, 0, 0, state, {}), with_optimizer=False)
        return state
    if MAP_BUFFER not in source.dense_entries:
        raise GenattError(
            f"checkpoint {redact(source.path)} has no map of items to rows, which table.managed_collision needs; "
            "use the configuration it began with"
        )
    return source.dense(lambda name: name == MAP_BUFFER)[MAP_BUFFER]
