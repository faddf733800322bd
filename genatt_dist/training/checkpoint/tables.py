"""One table under two names: among the dense parameters where it is replicated, else a table of its own.

Legend: V rows, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from genatt_dist.embedding.table import ITEM_TABLE, TableShard
from genatt_dist.training.checkpoint.read import Checkpoint


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
