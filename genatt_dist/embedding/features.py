"""What the model's input knows besides the item: rows of the attributes an item has, and of the context of an event.

The input at a position is E_item[id] + Σ_f mean of the rows that feature f has there; a feature that has none adds
nothing. Scores stay tied to E_item alone: attributes and context change what a history says, not what an item's score
is made of, so that ranking, the full softmax and an exported table are those of a model without features.

A replicated table belongs to the dense model, a sharded one to the collection of the item table, which is looked up
once a step for all of them.

Legend: N positions, K rows read, V rows of a table, D width.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from genatt_dist.config import RunConfig, TableConfig
from genatt_dist.data.device import Read
from genatt_dist.data.histories import Histories
from genatt_dist.embedding.feature_options import Feature
from genatt_dist.embedding.ranking import Query, Ranking
from genatt_dist.embedding.table import ITEM_TABLE, ItemTable, TableSpec, initial_rows, table_seed

if TYPE_CHECKING:
    from genatt_dist.embedding.sharded import ShardedTable
    from genatt_dist.embedding.summed import SummedUpdate


def feature_specs(config: RunConfig, num_rows: Mapping[str, int]) -> dict[str, TableSpec]:
    """The tables of a run's features by name. num_rows: of the data set, `Sequences.features.num_rows`."""
    width, seed = config.model.hidden_size, config.training.seed
    return {
        one.name: TableSpec(one.name, num_rows[one.name], width, config.table.init_std, table_seed(seed, one.name))
        for one in config.features
    }


def sharded_specs(config: RunConfig, num_rows: Mapping[str, int]) -> list[TableSpec]:
    """Those that lie beside a sharded item table."""
    specs = feature_specs(config, num_rows)
    return [specs[feature.name] for feature in config.features if feature.sharded]


class FeatureTables(nn.Module):
    """The replicated tables, and how rows of all are summed. of: all features; sharded: names of those that are looked
    up elsewhere.
    """

    def __init__(self, config: RunConfig, num_rows: Mapping[str, int]) -> None:
        super().__init__()
        specs = feature_specs(config, num_rows)
        self.of = config.features
        self.sharded = [feature.name for feature in config.features if feature.sharded]
        # A module may not be called `type` or `keys`, a column may.
        self.tables = nn.ModuleDict(
            {f"{name}_table": _Replicated(spec) for name, spec in specs.items() if name not in self.sharded}
        )

    def forward(self, features: Mapping[str, Read], rows: Mapping[str, Tensor]) -> Tensor:
        """What is added to the N item rows: [N, D]. rows: of the sharded tables' ids, by name."""
        parts = [table(features[name.removesuffix("_table")]) for name, table in self.tables.items()]
        for name in self.sharded:
            places_K = torch.arange(len(rows[name]), device=rows[name].device)
            parts.append(mean_rows(rows[name], Read(places_K, features[name].first_N)))
        return sum(parts[1:], parts[0])


class _Replicated(nn.Module):
    """A feature's rows on every rank, updated by the dense optimizer."""

    def __init__(self, spec: TableSpec) -> None:
        super().__init__()
        self.weight = nn.Parameter(initial_rows(0, spec.rows, spec.width, spec.init_std, spec.seed))

    def forward(self, read: Read) -> Tensor:
        return mean_rows(self.weight, read)


def mean_rows(rows_VD: Tensor, read: Read) -> Tensor:
    """The mean of the rows each position reads, zero where it reads none: [N, D]; nothing is padded."""
    return nn.functional.embedding_bag(read.row_K, rows_VD, read.first_N, mode="mean")


def replicated(config: RunConfig) -> RunConfig:
    """The same model with all rows of all tables in the dense model, for one process."""
    features = tuple(one.model_copy(update={"table": "replicated"}) if one.sharded else one for one in config.features)
    return config.model_copy(update={"table": TableConfig(init_std=config.table.init_std), "features": features})


@dataclass(frozen=True)
class FeaturedTable:
    """An item table whose model reads features too: where evaluation takes a table, this stands for both."""

    table: ItemTable
    features: FeatureTables

    def lookup(self, ids_N: Tensor) -> Tensor:
        return self.table.lookup(ids_N)

    def rank(self, query: Query, k: int, chunk: int) -> Ranking:
        return self.table.rank(query, k, chunk)

    def inputs(self, histories: Histories) -> Tensor:
        """See `input_rows`."""
        items_ND, rows = looked_up(self.table, histories.items_N, sharded_ids(self.features.of, histories.features))
        return items_ND + self.features(histories.features, rows)


def with_features(table: ItemTable, features: FeatureTables | None) -> ItemTable:
    """The table as evaluation takes it, of a model with or without features."""
    return table if features is None else FeaturedTable(table, features)


def input_rows(table: ItemTable, histories: Histories) -> Tensor:
    """What the backbone reads at the N positions of some histories: [N, D]. Collective when a table is sharded."""
    return table.inputs(histories) if isinstance(table, FeaturedTable) else table.lookup(histories.items_N)


def sharded_ids(features: Iterable[Feature], read: Mapping[str, Read]) -> dict[str, Tensor]:
    """Ids (int64 [K]) to look up in the sharded tables of features, by name."""
    return {feature.name: read[feature.name].row_K for feature in features if feature.sharded}


def looked_up(
    table: ItemTable | SummedUpdate, items_N: Tensor, ids: Mapping[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Item rows [N, D], and rows of the sharded features' ids by name: one lookup of all tables."""
    if not ids:
        return table.lookup(items_N), {}
    rows = cast("ShardedTable", table).lookup_tables({ITEM_TABLE: items_N, **ids})
    return rows.pop(ITEM_TABLE), rows
