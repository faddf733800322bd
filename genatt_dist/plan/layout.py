"""Which rows of which table lie on which rank: TorchRec's own planner, without ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from genatt_dist.config import RunConfig
from genatt_dist.embedding.features import sharded_specs
from genatt_dist.embedding.planner import plan
from genatt_dist.embedding.table import ITEM_TABLE, TableSpec, item_spec
from genatt_dist.plan.workload import Workload


@dataclass(frozen=True)
class Shard:
    """Rows first … first + rows − 1 of a table, on one rank."""

    table: str
    rank: int
    first: int
    rows: int
    columns: int


def specs(config: RunConfig, load: Workload) -> list[TableSpec]:
    """The sharded tables: items first, then features that ask for it."""
    if config.table.kind == "replicated":
        return []
    items = item_spec(load.num_items, config.model.hidden_size, config.table, config.training.seed)
    return [items, *sharded_specs(config, load.feature_rows)]


def shards(
    tables: Sequence[TableSpec], config: RunConfig, world_size: int, local: int, device: str, memory_bytes: int
) -> list[Shard]:
    """Every shard of every table. Raises GenattError where the planner finds no place for them."""
    if not tables:
        return []
    found = []
    for name, parameter in plan(tables, config.table, world_size, local, device, memory_bytes).plan[""].items():
        spec = parameter.sharding_spec
        for metadata in spec.shards:  # type: ignore[union-attr]
            (first, _), (rows, columns) = metadata.shard_offsets, metadata.shard_sizes
            found.append(Shard(name, metadata.placement.rank(), first, rows, columns))
    return found


def item_rows(found: Sequence[Shard]) -> int:
    """Rows of the item table on the rank that has most."""
    return max((shard.rows for shard in found if shard.table == ITEM_TABLE), default=0)


def gradient_bytes(found: Sequence[Shard]) -> int:
    """Of a float32 gradient of the item rows on the rank that has most, and of one further table's at a time."""
    most = {shard.table: 0 for shard in found}
    for shard in found:
        most[shard.table] = max(most[shard.table], 4 * shard.rows * shard.columns)
    items = most.pop(ITEM_TABLE, 0)
    return items + max(most.values(), default=0)
