"""One update a step of a sharded item table that is both looked up and scored whole (the tied full softmax).

The fused optimizer updates rows inside the backward of a lookup, so a gradient that comes to the same rows from the
scores would be a second update. Here both are summed first: rows are looked up without TorchRec's backward, their
gradients go to the ranks that hold the rows and are added to what the softmax left there, and the sum is applied once,
by the formula and to the state tensors of the fused kernel. Several backwards before the update are one batch.

Legend: N ids looked up here, G on all ranks, V rows on this rank, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from genatt_dist.embedding.exchange import Ranks, add_rows_
from genatt_dist.embedding.options import TableConfig
from genatt_dist.embedding.table import ITEM_TABLE

if TYPE_CHECKING:
    from genatt_dist.embedding.sharded import ShardedTable

_BLOCK_ELEMENTS = 1 << 20  # of rows updated together: scratch that stays small beside the table


@dataclass(frozen=True)
class Catalogue:
    """The rows that the full softmax scores here: the whole table, or this rank's shard of it.

    rows_VD: rows of the table, differentiable. first_row: the table's row that the first one is, None for a whole
    table. most_rows: of any rank.
    """

    rows_VD: Tensor
    first_row: int | None
    most_rows: int

    @property
    def padding(self) -> int:
        """Leading rows that are no items."""
        return 0 if self.first_row else 1


class SummedUpdate:
    """Lookups and the one update of sharded tables, of which the item table is scored whole too. Collective."""

    def __init__(self, table: ShardedTable, config: TableConfig) -> None:
        self._table, self._config, self._shards = table, config, table.shards
        self._items_VD = table.rows_VD.detach().requires_grad_()
        self._items_VD.grad_dtype = torch.float32  # also of a table of lower precision
        sizes = Ranks.of(len(self._items_VD), self._items_VD.device).sizes
        self.catalogue = Catalogue(self._items_VD, table.first_row, max(sizes))
        self._looked_up: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def lookup(self, ids_N: Tensor) -> Tensor:
        """Item rows [N, D] of the ids; their gradients wait for `update`."""
        return self.lookup_tables({ITEM_TABLE: ids_N})[ITEM_TABLE]

    def lookup_tables(self, ids: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Rows [N, D] of each table's ids, all in one call; their gradients wait for `update`."""
        with torch.no_grad():
            found = self._table.lookup_tables(ids)
        rows = {name: rows_ND.detach().requires_grad_() for name, rows_ND in found.items()}
        for name, rows_ND in rows.items():
            self._looked_up.setdefault(name, []).append((ids[name], rows_ND))
        return rows

    @torch.no_grad()
    def update(self) -> None:
        """Apply the gradients of everything since the last update, averaged over ranks as the fused kernel does."""
        rate, scale = self._table.learning_rate, 1 / dist.get_world_size()
        for name, looked_up in self._looked_up.items():
            ids_N = torch.cat([ids for ids, _ in looked_up])
            ranks = Ranks.of(len(ids_N), ids_N.device)
            ids_G, grad_GD = ranks.gather(ids_N), ranks.gather(torch.cat([_gradient(rows) for _, rows in looked_up]))
            for shard in self._shards:
                if shard.name != name:
                    continue
                scored = self._items_VD.grad if name == ITEM_TABLE else None
                gradient_VD = torch.zeros_like(shard.rows, dtype=torch.float32) if scored is None else scored
                columns = slice(shard.first_column, shard.first_column + shard.rows.shape[1])
                add_rows_(gradient_VD, ids_G - shard.first_row, grad_GD[:, columns])
                apply(self._config, rate, scale, shard.rows, gradient_VD, shard.optimizer)
        self._items_VD.grad = None
        self._looked_up.clear()


def _gradient(rows_ND: Tensor) -> Tensor:
    return torch.zeros_like(rows_ND) if rows_ND.grad is None else rows_ND.grad


def apply(
    config: TableConfig, rate: float, scale: float, rows_VD: Tensor, gradient_VD: Tensor, state: dict[str, Tensor]
) -> None:
    """One step of fbgemm's optimizer for all rows at once, g = scale · gradient; overwrites the gradient. A row without
    a gradient stays as it is.

    sgd: w −= ηg. adagrad: s += g², w −= ηg/(√s + ε). rowwise_adagrad: the same with one s a row, of the mean of g².
    In float32, rounded to the rows' precision at the end.
    """
    (moment_V,) = state.values() or (None,)
    block = max(1, _BLOCK_ELEMENTS // max(1, rows_VD.shape[1]))
    for first in range(0, len(rows_VD), block):
        here = slice(first, first + block)
        rows, gradient = rows_VD[here], gradient_VD[here].mul_(scale)
        if moment_V is not None:
            moment, square = moment_V[here].view(len(rows), -1), gradient.square()
            moment += square.mean(1, keepdim=True) if config.optimizer == "rowwise_adagrad" else square
            gradient.div_(moment.sqrt().add_(config.eps))
        rows.copy_(torch.sub(rows.float(), gradient, alpha=rate))
