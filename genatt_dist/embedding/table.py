"""What a table is (name, size, fresh rows), the item table behind one interface, and the replicated table inside the
dense model.

Row 0 of any table is padding and is never an item. Legend: N ids, V items, D width, B users.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from data_pipeline.errors import GenattError
from genatt_dist.attention.noise import Purpose, derive, normal
from genatt_dist.embedding.options import Sharding, TableConfig
from genatt_dist.embedding.ranking import Query, Ranking, rank_shard, target_scores

ITEM_TABLE = "item"
# Of managed collision, what a checkpoint has as tables beside it: `ManagedRows.shards`.
MAP_TABLE, SEEN_TABLE = "item.map", "item.seen"
_BLOCK_ELEMENTS = 1 << 20


@dataclass(frozen=True)
class TableSpec:
    """A table before it exists: `rows` rows (the padding row included) of `width`, drawn N(0, init_std²) by `seed`.

    sharding: how TorchRec cuts it; `auto` leaves that to the planner.
    """

    name: str
    rows: int
    width: int
    init_std: float
    seed: int
    sharding: Sharding = "auto"


def item_spec(num_items: int, width: int, config: TableConfig, seed: int) -> TableSpec:
    """The item table of a run whose training seed is `seed`."""
    rows = config.managed_collision.rows if config.managed_collision else num_items
    return TableSpec(ITEM_TABLE, rows + 1, width, config.init_std, seed, config.sharding)


def table_seed(seed: int, name: str) -> int:
    """The seed of table `name` in a run of training seed `seed`: tables of one run start from different rows."""
    derived = derive(seed, int(Purpose.INITIAL), zlib.crc32(name.encode()))
    assert isinstance(derived, int)
    return seed if name == ITEM_TABLE else derived


@dataclass(frozen=True)
class TableShard:
    """The rectangle of a sharded table that lies on this rank, as views: writing them changes the table.

    rows: [V, D] from row `first_row` and column `first_column` of table `name` on. optimizer: state of the same rows by
    name, [V] where it has one number a row, else [V, D].
    """

    name: str
    first_row: int
    first_column: int
    rows: Tensor
    optimizer: dict[str, Tensor]


class ItemTable(Protocol):
    """What training and evaluation ask of a table; the replicated and the sharded one answer equally."""

    def lookup(self, ids_N: Tensor) -> Tensor:
        """Rows [N, D] of the ids, differentiable."""

    def rank(self, query: Query, k: int, chunk: int) -> Ranking:
        """Rank all items for this rank's users (on every rank at once when the table is sharded)."""


def initial_rows(first: int, count: int, width: int, std: float, seed: int) -> Tensor:
    """Rows first … first + count − 1 of a fresh table, N(0, std²), keyed by row: any sharding starts from the same
    table.
    """
    rows = torch.empty(count, width)
    fill_initial_rows(rows, first, 0, width, std, seed)
    return rows


@torch.no_grad()
def fill_initial_rows(rows_VD: Tensor, first_row: int, first_column: int, width: int, std: float, seed: int) -> None:
    """Write into `rows_VD`, of any type and device, the part of a fresh table of `width` columns that begins at
    (first_row, first_column). In blocks: the draws' words take several times the rows, and a second copy of a large
    shard might not fit.
    """
    columns = slice(first_column, first_column + rows_VD.shape[1])
    block = max(1, _BLOCK_ELEMENTS // width)
    for low in range(0, len(rows_VD), block):
        part = rows_VD[low : low + block]
        row_N = torch.arange(first_row + low, first_row + low + len(part))
        part.copy_(fresh_rows(row_N, width, std, seed)[:, columns])
    rows_VD[: max(0, min(1 - first_row, len(rows_VD)))] = 0  # row 0 is padding


def fresh_rows(row_N: Tensor, width: int, std: float, seed: int) -> Tensor:
    """Some rows of a fresh table, none of them the padding row: float32 [N, D]."""
    key_N = derive(derive(seed, int(Purpose.INITIAL)), row_N)
    assert isinstance(key_N, Tensor)
    return normal(key_N, width) * std


def every_rank_has_rows(num_rows: int, world_size: int) -> bool:
    """Whether row-wise sharding (equal blocks, the last one shorter) leaves no rank without a row."""
    return (world_size - 1) * -(-num_rows // world_size) < num_rows


def check_shards(num_rows: int, world_size: int) -> None:
    """Raise GenattError when row-wise sharding leaves a rank no row: fbgemm looks up no ids in an empty table on the
    CPU.
    """
    if not every_rank_has_rows(num_rows, world_size):
        raise GenattError(
            f"table.kind=sharded: {num_rows - 1} items are too few for world_size={world_size}, some rank would hold "
            "no row; use table.kind=replicated, or lower world_size"
        )


class ReplicatedTable(nn.Module):
    """All rows on every rank, updated by the dense optimizer."""

    def __init__(self, num_items: int, width: int, std: float, seed: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(initial_rows(0, num_items + 1, width, std, seed))

    def forward(self, ids_N: Tensor) -> Tensor:
        return nn.functional.embedding(ids_N, self.weight)

    lookup = forward

    def rank(self, query: Query, k: int, chunk: int) -> Ranking:
        """Rank all items; every rank holds all rows, so nothing is exchanged."""
        return rank_rows(self.weight[1:], query, k, chunk)


def rank_rows(rows_VD: Tensor, query: Query, k: int, chunk: int) -> Ranking:
    """Rank the items 1..V given all their rows."""
    return rank_shard(query, rows_VD, 1, target_scores(query, rows_VD, 1), k, chunk)
