"""The item table row-wise sharded over the ranks by TorchRec, with its optimizer fused into the backward pass.

Reasons for the order of things (docs/architecture.md): the table is planned on every rank (a planner that fails on one
rank only would leave the others waiting), it is never inside the module that DeepSpeed gets (DeepSpeed would broadcast
and cast it), and each step looks ids up in one call (every lookup's backward is an optimizer step of its own).

Legend: N ids, V rows on this rank, D width, B users of the global batch.
"""

from __future__ import annotations

from typing import Any

import psutil
import torch
import torch.distributed as dist
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch import Tensor
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.distributed.types import ShardingType
from torchrec.modules.embedding_configs import EmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingCollection
from torchrec.optim.keyed import KeyedOptimizer
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from genatt_dist.config import TableConfig
from genatt_dist.embedding.ranking import Query, Ranking, merge, rank_shard, target_scores
from genatt_dist.embedding.table import TableShard, check_shards, initial_rows

_FEATURE = "item"
_OPTIMIZERS = {
    "rowwise_adagrad": EmbOptimType.EXACT_ROWWISE_ADAGRAD,
    "adagrad": EmbOptimType.EXACT_ADAGRAD,
    "sgd": EmbOptimType.EXACT_SGD,
}


class ShardedTable:
    """Rows first_id … first_id + V − 1 of the table live on this rank. Needs an initialised process group."""

    def __init__(
        self, num_items: int, width: int, config: TableConfig, learning_rate: float, seed: int, device: torch.device
    ) -> None:
        check_shards(num_items + 1, dist.get_world_size())
        collection = EmbeddingCollection(
            device=torch.device("meta"),
            tables=[
                EmbeddingConfig(
                    num_embeddings=num_items + 1, embedding_dim=width, name=_FEATURE, feature_names=[_FEATURE]
                )
            ],
        )
        sharder: Any = EmbeddingCollectionSharder(
            fused_params={"optimizer": _OPTIMIZERS[config.optimizer], "learning_rate": learning_rate, "eps": 1e-8}
        )
        self._model = DistributedModelParallel(
            collection, device=device, plan=_planner(device).plan(collection, [sharder]), sharders=[sharder]
        )
        self._device = device
        (self._sharded,) = self._model.state_dict().values()
        rows = initial_rows(self.first_row, len(self.rows_VD), width, config.init_std, seed)
        self.rows_VD.copy_(rows.to(device))

    def lookup(self, ids_N: Tensor) -> Tensor:
        """Rows [N, D] of the ids. Its backward updates the rows: one call a training step."""
        ids = KeyedJaggedTensor(keys=[_FEATURE], values=ids_N, lengths=torch.tensor([len(ids_N)], device=self._device))
        rows_ND: Tensor = self._model(ids)[_FEATURE].values()
        return rows_ND

    @property
    def rows_VD(self) -> Tensor:
        """This rank's rows, a view: writing it changes the table."""
        shards = self._sharded.local_shards()
        if shards:
            rows: Tensor = shards[0].tensor.detach()
            return rows
        return torch.empty(0, self._sharded.size(1), device=self._device)

    @property
    def first_row(self) -> int:
        """The table row that this rank's first one is."""
        shards = self._sharded.local_shards()
        return int(shards[0].metadata.shard_offsets[0]) if shards else int(self._sharded.size(0))

    @property
    def optimizer_state(self) -> dict[str, Tensor]:
        """This rank's part of the fused optimizer's state by name, views like `rows_VD`."""
        (states,) = self._optimizer.state_dict()["state"].values() or ({},)
        return {
            name.split(".")[-1]: value.local_shards()[0].tensor
            for name, value in states.items()
            if hasattr(value, "local_shards") and value.local_shards()
        }

    @property
    def shards(self) -> list[TableShard]:
        """What lies on this rank."""
        if not len(self.rows_VD):
            return []
        return [TableShard(_FEATURE, self.first_row, 0, self.rows_VD, self.optimizer_state)]

    @property
    def _optimizer(self) -> KeyedOptimizer:
        return self._model.fused_optimizer

    def set_learning_rate(self, rate: float) -> None:
        """The rate of the next backward: the fused optimizer reads it there, so set it before."""
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.step()  # a fused optimizer's step() only hands the rate to the kernel

    def rank(self, query: Query, k: int, chunk: int) -> Ranking:
        """Every rank scores all users of the global batch against its own rows; counts are summed, the best k
        merged.
        """
        sizes = _gather_sizes(len(query.states_BD), self._device)
        seen_sizes = _gather_sizes(len(query.seen_row_S), self._device)
        rank = dist.get_rank()
        whole = Query(
            states_BD=_gather(query.states_BD, sizes),
            seen_row_S=_gather(query.seen_row_S + sum(sizes[:rank]), seen_sizes),
            seen_item_S=_gather(query.seen_item_S, seen_sizes),
            target_B=_gather(query.target_B, sizes),
        )
        rows_VD, first = (self.rows_VD[1:], 1) if self.first_row == 0 else (self.rows_VD, self.first_row)
        score_B = target_scores(whole, rows_VD, first)
        dist.all_reduce(score_B, dist.ReduceOp.MAX)
        local = rank_shard(whole, rows_VD, first, score_B, k, chunk)
        dist.all_reduce(local.ahead_B)
        shape = [len(score_B)] * dist.get_world_size()
        scores = _gather(local.score_Bk, shape).view(len(shape), -1, k).transpose(0, 1).flatten(1)
        ids = _gather(local.top_Bk, shape).view(len(shape), -1, k).transpose(0, 1).flatten(1)
        score_Bk, top_Bk = merge(scores, ids, k)
        mine = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
        return Ranking(local.ahead_B[mine], top_Bk[mine], score_Bk[mine])


def _planner(device: torch.device) -> EmbeddingShardingPlanner:
    kind = ShardingType.ROW_WISE.value
    memory = (
        {"hbm_cap": torch.cuda.mem_get_info(device)[1]}
        if device.type == "cuda"
        else {"ddr_cap": psutil.virtual_memory().total}
    )
    return EmbeddingShardingPlanner(
        topology=Topology(world_size=dist.get_world_size(), compute_device=device.type, **memory),
        constraints={
            _FEATURE: ParameterConstraints(sharding_types=[kind], compute_kernels=[EmbeddingComputeKernel.FUSED.value])
        },
    )


def _gather_sizes(size: int, device: torch.device) -> list[int]:
    sizes = torch.zeros(dist.get_world_size(), dtype=torch.int64, device=device)
    sizes[dist.get_rank()] = size
    dist.all_reduce(sizes)
    return [int(value) for value in sizes.tolist()]


def _gather(x_B: Tensor, sizes: list[int]) -> Tensor:
    """Concatenate every rank's rows (sizes[r] of them from rank r)."""
    padded = x_B.new_zeros((max(sizes), *x_B.shape[1:]))
    padded[: len(x_B)] = x_B
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])
