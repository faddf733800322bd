"""Which rows and columns of which table lie on which rank: TorchRec's planner under this product's constraints.

Needs no process group, no data and no device: `genatt plan` calls it on a laptop for a whole cluster. In training every
rank makes the plan by itself from equal arguments: a collective plan would leave the others waiting when one fails.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType, SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_training import WeightDecayMode
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import (
    HardwareConfig,
    KernelConfig,
    PlannerError,
    TopologyFactory,
    TrainerConfig,
)
from torchrec.distributed.types import ShardingPlan
from torchrec.modules.embedding_configs import DataType, EmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingCollection

from data_pipeline.errors import GenattError
from genatt_dist.embedding.options import CPU_SHARDINGS, ROWWISE_OPTIMIZERS, TableConfig, check_device
from genatt_dist.embedding.table import ITEM_TABLE, TableSpec, check_shards, every_rank_has_rows
from genatt_dist.launch.limits import available_memory

_OPTIMIZERS = {
    "rowwise_adagrad": EmbOptimType.EXACT_ROWWISE_ADAGRAD,
    "adagrad": EmbOptimType.EXACT_ADAGRAD,
    "sgd": EmbOptimType.EXACT_SGD,
    "adam": EmbOptimType.ADAM,
    "partial_rowwise_adam": EmbOptimType.PARTIAL_ROWWISE_ADAM,
}
_RESERVED = 0.15  # share of memory for all that is not a table (`genatt plan` counts it)
_DECAY = {"l2": WeightDecayMode.L2, "decoupled": WeightDecayMode.DECOUPLE}
DATA_TYPES = {"fp32": DataType.FP32, "bf16": DataType.BF16, "fp16": DataType.FP16}
# Bytes of optimizer state of one weight and of one row.
_STATE_BYTES = {
    "rowwise_adagrad": (0, 4),
    "adagrad": (4, 0),
    "sgd": (0, 0),
    "adam": (8, 0),
    "partial_rowwise_adam": (4, 4),
}


def collection(specs: Sequence[TableSpec], config: TableConfig) -> EmbeddingCollection:
    """All tables as one module without storage (`meta`): one collection is one exchange of ids a step."""
    return EmbeddingCollection(
        device=torch.device("meta"),
        tables=[
            EmbeddingConfig(
                name=spec.name,
                feature_names=[spec.name],
                num_embeddings=spec.rows,
                embedding_dim=spec.width,
                data_type=DATA_TYPES[config.precision],
            )
            for spec in specs
        ],
    )


def sharder(config: TableConfig, learning_rate: float) -> EmbeddingCollectionSharder:
    """What makes sharded tables of a collection, with the optimizer fused into their backward pass.

    Rows come back as float32 whatever their precision, and they round to nearest: fbgemm's stochastic rounding draws
    from global state.
    """
    fused: dict[str, Any] = {
        "optimizer": _OPTIMIZERS[config.optimizer],
        "learning_rate": learning_rate,
        "eps": config.eps,
        "output_dtype": SparseType.FP32,
        "stochastic_rounding": False,
    }
    if config.weight_decay:
        fused |= {"weight_decay": config.weight_decay, "weight_decay_mode": _DECAY[config.weight_decay_mode]}
    if config.max_norm is not None:
        fused["max_norm"] = config.max_norm
    return EmbeddingCollectionSharder(fused_params=fused)


def plan(
    specs: Sequence[TableSpec],
    config: TableConfig,
    world_size: int,
    local_world_size: int,
    device_type: str,
    memory_bytes: int,
) -> ShardingPlan:
    """What lies where: `plan(...).plan[""][table name].sharding_spec.shards`, each with offsets, sizes and a rank.

    memory_bytes: what one rank has (of GPU memory on `cuda`, of its share of the host's on `cpu`). Raises GenattError:
    a combination the device or TorchRec cannot run, tables that do not fit.
    """
    check_device(config, device_type)
    for spec in specs:
        _check(spec, config, world_size, device_type)
    with _quiet():
        planner = EmbeddingShardingPlanner(
            topology=_topology(world_size, local_world_size, device_type, memory_bytes),
            constraints={
                spec.name: ParameterConstraints(
                    sharding_types=_sharding_types(spec, world_size),
                    compute_kernels=[EmbeddingComputeKernel.FUSED.value],
                )
                for spec in specs
            },
            storage_reservation=FixedPercentageStorageReservation(_RESERVED),
            debug=False,
        )
        try:
            return planner.plan(collection(specs, config), [sharder(config, learning_rate=1.0)])  # type: ignore[list-item]
        except PlannerError as error:
            raise _explained(error, specs, config, world_size, memory_bytes) from None


def local_memory(device: torch.device, local_world_size: int) -> int:
    """Bytes of memory of this rank's device, or its share of this host's."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    return available_memory() // local_world_size


def local_ranks(world_size: int) -> int:
    """Ranks on this host: what the launcher says in LOCAL_WORLD_SIZE, else all of them."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world_size))


def bytes_of(spec: TableSpec, config: TableConfig) -> tuple[int, int]:
    """Bytes of a whole table's rows, and of its optimizer's state."""
    each, row = _STATE_BYTES[config.optimizer]
    return spec.rows * spec.width * (4 if config.precision == "fp32" else 2), spec.rows * (each * spec.width + row)


def _topology(world_size: int, local_world_size: int, device_type: str, memory_bytes: int) -> Topology:
    cap = {"hbm_cap_bytes": memory_bytes} if device_type == "cuda" else {"ddr_cap_bytes": memory_bytes}
    return TopologyFactory.create_topology(
        TrainerConfig(world_size=world_size, local_world_size=local_world_size),
        HardwareConfig(**cap),
        KernelConfig(compute_device=device_type),
    )


def _sharding_types(spec: TableSpec, world_size: int) -> list[str]:
    """The kinds the planner may choose from. Every rank scores items, so theirs is cut by rows."""
    if spec.sharding != "auto":
        return [spec.sharding]
    if spec.name == ITEM_TABLE:
        return ["row_wise"]
    return ["table_wise", "row_wise"] if every_rank_has_rows(spec.rows, world_size) else ["table_wise"]


def _check(spec: TableSpec, config: TableConfig, world_size: int, device_type: str) -> None:
    """What TorchRec would refuse with a traceback, or do with another result on another number of ranks."""
    if device_type == "cpu" and spec.sharding not in CPU_SHARDINGS:
        raise GenattError(
            f"table {spec.name}: sharding={spec.sharding} on cpu: fbgemm's kernels run "
            f"{', '.join(CPU_SHARDINGS)} there; use one of these, or CUDA"
        )
    if spec.sharding == "column_wise" and config.optimizer in ROWWISE_OPTIMIZERS:
        raise GenattError(
            f"table {spec.name}: sharding=column_wise with table.optimizer={config.optimizer}: each part of a row "
            "would keep a state of its own, so the result would depend on the number of ranks; use adagrad, sgd or adam"
        )
    if spec.sharding == "column_wise" and (spec.width % 4 or spec.width < 4):
        raise GenattError(
            f"table {spec.name}: sharding=column_wise of {spec.width} columns: fbgemm needs a multiple of 4"
        )
    if "row_wise" in _sharding_types(spec, world_size):
        check_shards(spec.rows, world_size)


def _explained(
    error: PlannerError, specs: Sequence[TableSpec], config: TableConfig, world_size: int, memory_bytes: int
) -> GenattError:
    sizes = {spec.name: sum(bytes_of(spec, config)) for spec in specs}
    largest = max(sizes, key=lambda name: sizes[name])
    shown = ", ".join(f"{name} {size / 2**30:.3g} GiB" for name, size in sizes.items())
    if sum(sizes.values()) < memory_bytes * world_size // 2:
        return GenattError(f"no sharding plan for tables {shown} on {world_size} ranks: {' '.join(str(error).split())}")
    return GenattError(
        f"tables with optimizer state ({shown}) do not fit {world_size} ranks of {memory_bytes / 2**30:.3g} GiB: raise "
        f"world_size, make table {largest} narrower (model.hidden_size), or set table.precision=fp16 or "
        "table.optimizer=rowwise_adagrad"
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """TorchRec's planner reports at length through its loggers; what matters of it comes as an error."""
    logger = logging.getLogger("torchrec")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
