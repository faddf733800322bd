"""Which rows of the feature tables every position of a batch reads. Computed with numpy where batches are put together,
in the background, so that no step waits for a count. Without torch.

Legend: N positions, K rows read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from data_pipeline.format import Manifest
from genatt_dist.data.arrays import Ints, Items
from genatt_dist.data.attributes import ItemValues, read_values
from genatt_dist.data.context import CONTEXTS, check_unit
from genatt_dist.embedding.feature_options import AttributeFeature, ContextFeature, Feature


class Bags(NamedTuple):
    """Position i reads the rows row_K[first_N[i] : first_N[i + 1]] (the last one to the end), maybe none: int64."""

    row_K: Ints
    first_N: Ints


@dataclass(frozen=True)
class FeatureReader:
    """The features of a data set. values: of its items, by name of the feature. contexts: column by name."""

    values: dict[str, ItemValues] = field(default_factory=dict)
    contexts: dict[str, str] = field(default_factory=dict)

    @staticmethod
    def of(features: Sequence[Feature], path: str, manifest: Manifest) -> FeatureReader:
        """Read what the features need beside the shards. Raises GenattError when the data set does not have it."""
        contexts: dict[str, str] = {one.name: one.column for one in features if isinstance(one, ContextFeature)}
        if contexts:
            check_unit(manifest.time_unit, f"features.{next(iter(contexts))}: {manifest.name}")
        attributes = [one for one in features if isinstance(one, AttributeFeature)]
        return FeatureReader(read_values(path, manifest, attributes), contexts)

    @property
    def num_rows(self) -> dict[str, int]:
        """Rows of each feature's table, by name; row 0 is nobody's among values, and unknown times'."""
        rows = {name: values.num_rows for name, values in self.values.items()}
        return rows | {name: CONTEXTS[column][1] for name, column in self.contexts.items()}

    def bags(self, items_N: Items, lengths: Ints, seconds_N: Ints | None) -> dict[str, Bags]:
        """What the positions of some histories read. lengths: of each history. seconds_N: None where no time is
        known.
        """
        bags = {name: Bags(*values.of(items_N)) for name, values in self.values.items()}
        each_N = np.arange(len(items_N))
        for name, column in self.contexts.items():
            first = np.cumsum(lengths) - lengths
            row_N = np.zeros(len(items_N), np.int64) if seconds_N is None else CONTEXTS[column][0](seconds_N, first)
            bags[name] = Bags(row_N, each_N)
        return bags
