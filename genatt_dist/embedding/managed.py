"""A catalogue in fewer rows than it has items: TorchRec's managed collision gives rows to the items that training sees
most, and takes them back from those it sees no more.

The map of items to rows is a step of its own in front of the lookup and the same on every rank: all ranks count the
items of the whole global batch and update the map by them, so that it depends neither on how many ranks there are nor
on how a batch lies on them, and a checkpoint of it resumes on any number. It costs 24 bytes and 16 for each of the
policy's numbers (one, or two for distance_lfu) a row, and 8 bytes an item, on every rank.

Row 0 is padding, the last row is shared by all items without one of their own. These read and train the shared row; as
they cannot be told apart by their scores, they are not recommended, and a target among them counts as missed.

Legend: N ids, R rows of the table, V items, B users, S seen pairs, k items kept, C of a chunk, E rows with a new owner,
F columns of the state: owner, then the policy's numbers.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor
from torchrec.modules.mc_modules import (
    DistanceLFU_EvictionPolicy,
    LFU_EvictionPolicy,
    LRU_EvictionPolicy,
    MCHManagedCollisionModule,
)
from torchrec.sparse.jagged_tensor import JaggedTensor

from genatt_dist.embedding.exchange import Ranks, gather_all
from genatt_dist.embedding.options import ManagedCollision
from genatt_dist.embedding.ranking import Filter, Query, Ranking
from genatt_dist.embedding.table import ITEM_TABLE, MAP_TABLE, SEEN_TABLE, ItemTable, TableShard

_POLICIES = {"lfu": LFU_EvictionPolicy, "lru": LRU_EvictionPolicy, "distance_lfu": DistanceLFU_EvictionPolicy}
_NO_ID = torch.iinfo(torch.int64).max  # TorchRec's mark of a row without an owner


class ManagedRows:
    """The map of items 1..V to rows 1..R − 1 of the item table, of which the last is shared."""

    def __init__(self, config: ManagedCollision, num_items: int, device: torch.device) -> None:
        self._config, self._num_items = config, num_items
        self._map = _Map(
            zch_size=config.rows,
            device=device,
            eviction_policy=_POLICIES[config.policy](),
            eviction_interval=1,  # counted here
            output_global_offset=1,
        )
        self._state_RF = torch.zeros(config.rows + 1, 1 + self._map.num_numbers, dtype=torch.int64, device=device)
        self._seen_V1 = torch.zeros(num_items + 1, 1, dtype=torch.int64, device=device)
        self._steps = 0

    @property
    def owners_R(self) -> Tensor:
        """The item that a row belongs to, 0 where it belongs to none: int64 [R]."""
        return self._map.rows()[:, 0]

    def rows_of(self, ids_N: Tensor) -> Tensor:
        """The row each item reads, its own or the shared one: int64 [N]."""
        lengths = torch.full((1,), len(ids_N), device=ids_N.device)
        return self._map.remap({ITEM_TABLE: JaggedTensor(ids_N, lengths=lengths)})[ITEM_TABLE].values()

    def observe(self, items_N: Tensor) -> Tensor | None:
        """Count this rank's items of one training step. At the first step and every `eviction_interval` from there the
        map follows the counts, and the rows that have a new owner come back: int64 [E]. Collective.

        The first items get rows at once: while all read one row, its gradients cancel but for rounding, which Adagrad
        would make steps of.
        """
        items_G = gather_all(items_N)
        self._seen_V1[:, 0].index_add_(0, items_G, torch.ones_like(items_G))
        self._steps += 1
        if (self._steps - 1) % self._config.eviction_interval:
            return None
        ids_N = self._seen_V1[:, 0].nonzero()[:, 0]
        changed_E = self._map.follow(ids_N, self._seen_V1[ids_N, 0])
        self._seen_V1.zero_()
        return changed_E

    def rank(self, ranked: Callable[[Query, int, int], Ranking], query: Query, k: int, chunk: int) -> Ranking:
        """Rank the items that have a row of their own; `ranked` ranks rows. Of equal scores the lower row comes first.

        Collective where `ranked` is.
        """
        owner_R, inner = self.owners_R, query.only
        seen_row_S, target_row_B = self._own_rows(query.seen_item_S), self._own_rows(query.target_B)
        owned_S = seen_row_S > 0

        def allowed(row_C: Tensor) -> Tensor:
            owner_C = owner_R[row_C]
            owned_1C = (owner_C > 0)[None]
            return owned_1C if inner is None else owned_1C & inner.allowed(owner_C.clamp(min=1))

        group_B = torch.zeros_like(query.target_B) if inner is None else inner.group_B
        found = ranked(
            Query(
                query.states_BD,
                query.seen_row_S[owned_S],
                seen_row_S[owned_S],
                target_row_B,
                Filter(group_B, allowed),
            ),
            k,
            chunk,
        )
        ahead_B = found.ahead_B.masked_fill(target_row_B == 0, self._num_items)
        return Ranking(ahead_B, owner_R[found.top_Bk], found.score_Bk)

    @property
    def shards(self) -> list[TableShard]:
        """This rank's part of what a checkpoint needs, views that `restored` reads back: of the map a row for each row
        of the table (owner and the policy's numbers; the padding row has the counts of updates and of steps), and how
        often each item was seen since the last update.
        """
        self._state_RF.copy_(self._map.rows())
        self._state_RF[0, :2] = torch.tensor((self._map.updates, self._steps))
        return [
            TableShard(name, part.start, 0, whole[part], {})
            for name, whole in self._stored().items()
            if (part := _part(len(whole))).start < part.stop
        ]

    def restored(self) -> None:
        """Take up what was written into `shards` on all ranks. Collective."""
        for whole in self._stored().values():
            part = whole[_part(len(whole))]
            whole.copy_(Ranks.of(len(part), part.device).gather(part))
        self.load(self._state_RF)

    def load(self, state_RF: Tensor) -> None:
        """Take up the whole map as `shards` has it."""
        updates, self._steps = state_RF[0, :2].tolist()
        self._map.take(state_RF.to(self._state_RF.device), updates)

    def _own_rows(self, ids_N: Tensor) -> Tensor:
        """The items' own rows, 0 where they have none: int64 [N]."""
        row_N = self.rows_of(ids_N)
        return row_N.masked_fill(row_N == self._config.rows, 0)

    def _stored(self) -> dict[str, Tensor]:
        return {MAP_TABLE: self._state_RF, SEEN_TABLE: self._seen_V1}


class ManagedTable:
    """An item table in one process whose R rows are `table`'s and belong to the items that `managed` says."""

    def __init__(self, table: ItemTable, managed: ManagedRows) -> None:
        self.table, self._managed = table, managed

    def lookup(self, ids_N: Tensor) -> Tensor:
        return self.table.lookup(self._managed.rows_of(ids_N))

    def rank(self, query: Query, k: int, chunk: int) -> Ranking:
        return self._managed.rank(self.table.rank, query, k, chunk)


class _Map(MCHManagedCollisionModule):
    """TorchRec's map, told how often each id occurred instead of all occurrences: its own history of them has a fixed
    size, drops what is more, and is in no checkpoint.
    """

    @property
    def updates(self) -> int:
        return max(0, self._current_iter)

    @property
    def num_numbers(self) -> int:
        return len(self._mch_metadata)

    @torch.no_grad()
    def follow(self, ids_N: Tensor, counts_N: Tensor) -> Tensor:
        """Give rows to the ids the policy prefers to the present owners: rows that changed hands, int64 [E]."""
        self._current_iter = self.updates + 1
        last_N = torch.full_like(ids_N, self._current_iter)
        self._update_and_evict(ids_N, counts_N, {"last_access_iter": last_N})
        changed_E = self.evict()
        assert changed_E is not None
        return changed_E

    def rows(self) -> Tensor:
        """Owner (0: none) and the policy's numbers by row: int64 [R, F]."""
        ids, row = self._mch_sorted_raw_ids, self._mch_remapped_ids_mapping
        state_RF = ids.new_zeros(len(ids) + 1, 1 + self.num_numbers)
        state_RF[row] = torch.stack((ids.masked_fill(ids == _NO_ID, 0), *self._mch_metadata.values()), 1)
        return state_RF

    def take(self, state_RF: Tensor, updates: int) -> None:
        """Be the map that `rows` told, after so many updates."""
        owner = state_RF[1:, 0]
        self._mch_sorted_raw_ids.copy_(owner.masked_fill(owner == 0, _NO_ID))
        self._mch_remapped_ids_mapping.copy_(torch.arange(1, len(state_RF), device=owner.device))
        for column, numbers in enumerate(self._mch_metadata.values(), 1):
            numbers.copy_(state_RF[1:, column])
        self._current_iter = updates
        self._sort_mch_buffers()


def _part(rows: int) -> slice:
    """The rows of a whole that this rank writes."""
    each = -(-rows // dist.get_world_size())
    first = min(rows, dist.get_rank() * each)
    return slice(first, min(rows, first + each))
