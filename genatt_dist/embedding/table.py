"""The item table behind one interface, and the replicated table: an `nn.Embedding` inside the dense model.

Row 0 is padding and is never an item. Legend: N ids, V items, D width, B users.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from data_pipeline.errors import GenattError
from genatt_dist.attention.noise import Purpose, derive, normal
from genatt_dist.embedding.ranking import Query, Ranking, rank_shard, target_scores

_BLOCK_ROWS = 1 << 18


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
    for ids in torch.arange(first, first + count).split(_BLOCK_ROWS):  # the draws' words take several times the rows
        key = derive(derive(seed, int(Purpose.INITIAL)), ids)
        assert isinstance(key, Tensor)
        rows[ids[0] - first : ids[-1] - first + 1] = normal(key, width) * std
    rows[: max(0, min(1 - first, count))] = 0  # row 0 is padding
    return rows


def check_shards(num_rows: int, world_size: int) -> None:
    """Raise GenattError when row-wise sharding (equal blocks, the last one shorter) leaves a rank none: fbgemm looks up
    no ids in an empty table on the CPU.
    """
    if (world_size - 1) * -(-num_rows // world_size) >= num_rows:
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
