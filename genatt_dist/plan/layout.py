"""Which rows of which table lie on which rank: TorchRec's own planner, without ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from genatt_dist.config import RunConfig
from genatt_dist.embedding.planner import plan
from genatt_dist.embedding.table import ITEM_TABLE, TableSpec, item_spec, table_seed

_CONTEXT_ROWS = {"hour_of_week": 169, "gap": 64}
_UNKNOWN_VALUES = 10_000  # rows of an attribute's table whose values nobody counted, assumed


@dataclass(frozen=True)
class Shard:
    """Rows first … first + rows − 1 of a table, on one rank."""

    table: str
    rank: int
    first: int
    rows: int
    columns: int


def specs(config: RunConfig, num_items: int) -> list[TableSpec]:
    """The sharded tables: items first, then features that ask for it."""
    if config.table.kind == "replicated":
        return []
    width, seed = config.model.hidden_size, config.training.seed
    found = [item_spec(num_items, width, config.table, seed)]
    for feature in config.features:
        if feature.sharded:
            rows = feature_rows(feature)
            found.append(TableSpec(feature.name, rows, width, config.table.init_std, table_seed(seed, feature.name)))
    return found


def feature_rows(feature: object) -> int:
    """Rows of a feature's table as far as the configuration tells."""
    column = getattr(feature, "column", "")
    if getattr(feature, "type", "") == "context":
        return _CONTEXT_ROWS.get(column, _UNKNOWN_VALUES)
    return (getattr(feature, "buckets", None) or _UNKNOWN_VALUES) + 1


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
