"""All tables of a model that are sharded over the ranks, in one TorchRec collection, with the optimizer fused into its
backward pass.

Reasons for the order of things (docs/architecture.md): the tables are planned on every rank (a planner that fails on
one rank only would leave the others waiting), they are never inside the module that DeepSpeed gets (DeepSpeed would
broadcast and cast them), and each step looks all ids up in one call (every lookup's backward is an optimizer step of
its own).

Legend: N ids, V rows on this rank, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from fbgemm_gpu.split_table_batched_embeddings_ops_training import SplitTableBatchedEmbeddingBagsCodegen
from torch import Tensor
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.modules.embedding_configs import data_type_to_dtype
from torchrec.optim.keyed import KeyedOptimizer
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from data_pipeline.errors import GenattError
from genatt_dist.config import TableConfig
from genatt_dist.embedding.managed import ManagedRows
from genatt_dist.embedding.planner import DATA_TYPES, collection, local_memory, local_ranks, plan, sharder
from genatt_dist.embedding.rank_exchange import rank_over_ranks
from genatt_dist.embedding.ranking import Query, Ranking
from genatt_dist.embedding.table import ITEM_TABLE, TableShard, TableSpec, fill_initial_rows, fresh_rows, item_spec


class ShardedTable:
    """The item table and what other tables a model has, by name. Needs an initialised process group."""

    def __init__(
        self,
        num_items: int,
        width: int,
        config: TableConfig,
        learning_rate: float,
        seed: int,
        device: torch.device,
        others: Sequence[TableSpec] = (),
    ) -> None:
        """others: tables beside the item table, of the same width; `table_seed(seed, name)` is a seed for one.

        Raises GenattError where device, TorchRec or memory cannot hold the tables as configured. Collective.
        """
        specs = [item_spec(num_items, width, config, seed), *others]
        _check_specs(specs)
        self._items, self._dtype = specs[0], data_type_to_dtype(DATA_TYPES[config.precision])
        self._device, self._names = device, [spec.name for spec in specs]
        self.learning_rate = learning_rate
        tables, maker = collection(specs, config), sharder(config, learning_rate)
        here = local_ranks(dist.get_world_size())
        # Of all hosts the least: ranks that plan from unequal numbers would make different plans.
        local, memory = _least(here, device), _least(local_memory(device, here), device)
        self._model = DistributedModelParallel(
            tables,
            device=device,
            plan=plan(specs, config, dist.get_world_size(), local, device.type, memory),
            sharders=[maker],  # type: ignore[list-item]
        )
        self._tensors: dict[str, ShardedTensor] = {
            key.split(".")[-2]: tensor for key, tensor in self._model.state_dict().items()
        }
        for spec in specs:
            for shard in self._tensors[spec.name].local_shards():
                row, column = shard.metadata.shard_offsets
                fill_initial_rows(shard.tensor.detach(), row, column, spec.width, spec.init_std, spec.seed)
        managed = config.managed_collision
        self._managed = ManagedRows(managed, num_items, device) if managed else None

    def observe(self, items_N: Tensor) -> None:
        """Tell a table with managed collision which items a training step's windows have, before they are looked up:
        rows that change hands start afresh, without optimizer state. Collective; else nothing happens.
        """
        changed_E = self._managed.observe(items_N) if self._managed else None
        if changed_E is None:
            return
        for shard in self._sharded():
            place_E = changed_E - shard.first_row
            here_E = (place_E >= 0) & (place_E < len(shard.rows))
            if shard.name == ITEM_TABLE:
                spec, place_E = self._items, place_E[here_E]
                rows_ED = fresh_rows(changed_E[here_E], spec.width, spec.init_std, spec.seed)
                shard.rows.index_copy_(0, place_E, rows_ED.to(shard.rows.dtype))
                for state in shard.optimizer.values():
                    state.index_fill_(0, place_E, 0)

    def restored(self) -> None:
        """To be called when `shards` were filled from a checkpoint. Collective."""
        if self._managed:
            self._managed.restored()

    def lookup(self, ids_N: Tensor) -> Tensor:
        """Item rows [N, D] of the ids, float32. Its backward updates the rows: one lookup a training step, this or
        `lookup_tables`.
        """
        return self.lookup_tables({ITEM_TABLE: ids_N})[ITEM_TABLE]

    def lookup_tables(self, ids: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Rows [N, D] float32 of each table's ids (int64 [N], N of its own), by table name; a table that is not named
        is asked for none. All of a step in one call: its backward updates all tables. Collective, backward too: all
        ranks name the same tables, and their losses depend on the rows of each, be they none.

        An id travels once, however often it is asked for: windows and negatives repeat popular items.
        """
        nothing = torch.empty(0, dtype=torch.int64, device=self._device)
        if self._managed and ITEM_TABLE in ids:
            ids = {**ids, ITEM_TABLE: self._managed.rows_of(ids[ITEM_TABLE])}
        unique = {name: ids_N.unique(return_inverse=True) for name, ids_N in ids.items()}
        parts = [unique[name][0] if name in unique else nothing for name in self._names]
        lengths = torch.tensor([len(part) for part in parts], device=self._device)
        found = self._model(KeyedJaggedTensor(keys=self._names, values=torch.cat(parts), lengths=lengths))
        return {name: found[name].values().index_select(0, inverse_N) for name, (_, inverse_N) in unique.items()}

    @property
    def rows_VD(self) -> Tensor:
        """This rank's item rows, a view: writing it changes the table. Whole rows (the item table is never cut by
        columns).
        """
        shards = self._tensors[ITEM_TABLE].local_shards()
        if shards:
            rows: Tensor = shards[0].tensor.detach()
            return rows
        return torch.empty(0, self._items.width, dtype=self._dtype, device=self._device)

    @property
    def first_row(self) -> int:
        """The item table's row that this rank's first one is."""
        shards = self._tensors[ITEM_TABLE].local_shards()
        return int(shards[0].metadata.shard_offsets[0]) if shards else self._items.rows

    @property
    def optimizer_state(self) -> dict[str, Tensor]:
        """This rank's part of the fused optimizer's state of the item table by name, views like `rows_VD`."""
        return next((shard.optimizer for shard in self._sharded() if shard.name == ITEM_TABLE), {})

    @property
    def shards(self) -> list[TableShard]:
        """What lies on this rank, in the order of the tables, then of rows and columns; and this rank's part of the
        map of managed collision, which is taken up by `restored`.
        """
        return [*self._sharded(), *(self._managed.shards if self._managed else [])]

    def _sharded(self) -> list[TableShard]:
        states = self._states()
        return [
            TableShard(
                name,
                int(shard.metadata.shard_offsets[0]),
                int(shard.metadata.shard_offsets[1]),
                shard.tensor.detach(),
                {state: parts[index] for state, parts in states.get(name, {}).items()},
            )
            for name in self._names
            for index, shard in enumerate(self._tensors[name].local_shards())
        ]

    def _states(self) -> dict[str, dict[str, list[Tensor]]]:
        """The fused optimizer's state by table, by name of the state: a tensor for each local shard."""
        return {
            parameter.split(".")[-2]: {
                name.split(".")[-1]: [shard.tensor for shard in value.local_shards()]
                for name, value in state.items()
                if isinstance(value, ShardedTensor)
            }
            for parameter, state in self._optimizer.state_dict()["state"].items()
        }

    @property
    def _optimizer(self) -> KeyedOptimizer:
        return self._model.fused_optimizer

    def set_learning_rate(self, rate: float) -> None:
        """The rate of the next backward: the fused optimizer reads it there, so set it before."""
        self.learning_rate = rate
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.step()  # a fused optimizer's step() only hands the rate to the kernel

    def set_updates(self, count: int) -> None:
        """Updates done so far, before each one: fbgemm's Adam corrects its moments by a count of its own, which lies in
        no state and grows with every lookup, evaluation's too.
        """
        for module in self._model.modules():
            for lookup in getattr(module, "_lookups", ()):  # a plain list: `modules` does not go into it
                for kernel in lookup.modules():
                    if isinstance(kernel, SplitTableBatchedEmbeddingBagsCodegen):
                        kernel.iter.fill_(count)
                        kernel.iter_cpu.fill_(count)

    def rank(self, query: Query, k: int, chunk: int) -> Ranking:
        """Rank all items for this rank's users, exactly as the replicated table does. Collective."""
        if self._managed:
            return self._managed.rank(self._rank_rows, query, k, chunk)
        return self._rank_rows(query, k, chunk)

    def _rank_rows(self, query: Query, k: int, chunk: int) -> Ranking:
        rows_VD, first_id = (self.rows_VD[1:], 1) if self.first_row == 0 else (self.rows_VD, self.first_row)
        return rank_over_ranks(query, rows_VD, first_id, k, chunk)


def _check_specs(specs: Sequence[TableSpec]) -> None:
    names = [spec.name for spec in specs]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise GenattError(
            f"two tables are called {twice[0]}: give each feature a name of its own, other than {ITEM_TABLE}"
        )
    for spec in specs:
        if spec.width != specs[0].width:
            raise GenattError(
                f"table {spec.name} is {spec.width} wide and table {ITEM_TABLE} {specs[0].width}: one TorchRec "
                "collection has one width; give all model.hidden_size"
            )


def _least(value: int, device: torch.device) -> int:
    """The least over ranks: unequal plans of unequal hosts would wait for each other."""
    least = torch.tensor(value, device=device)
    dist.all_reduce(least, dist.ReduceOp.MIN)
    return int(least)
