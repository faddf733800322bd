"""How much a rank gets in a step, from the manifest's counts or from what the user says: no sequence is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from data_pipeline.errors import GenattError
from genatt_dist.config import RunConfig
from genatt_dist.data.context import CONTEXTS
from genatt_dist.data.features import FeatureReader
from genatt_dist.embedding.feature_options import ContextFeature, Feature

_ASSUMED_VALUES = 10_000  # of an attribute that nobody counted


@dataclass(frozen=True)
class FeatureSize:
    """rows: of a feature's table. values: that a position reads, on average."""

    rows: int
    values: float


@dataclass(frozen=True)
class Workload:
    """The data as far as a plan needs it.

    num_items: V. positions: mean of a window; longest: of any. interactions: as stored, 0
    where unknown. source: where this comes from, for the reader. features: by name.
    """

    num_items: int
    positions: float
    longest: int
    interactions: int
    source: str
    features: dict[str, FeatureSize] = field(default_factory=dict)

    @property
    def feature_rows(self) -> dict[str, int]:
        return {name: feature.rows for name, feature in self.features.items()}

    def shortened(self, longest: int) -> Workload:
        """The same with windows of at most `longest` positions."""
        return replace(self, longest=longest, positions=min(self.positions, float(longest)))


@dataclass(frozen=True)
class Share:
    """What the fullest rank gets of one global batch: sequences of `length` positions each.

    The largest a batch's attention can be: a batch has equal tokens, so most padding-free squares come from the longest
    windows. mean_sequences: of the average window, for the time of a step.
    """

    sequences: int
    length: int

    @property
    def tokens(self) -> int:
        return self.sequences * self.length


def workload(config: RunConfig, items: int | None, length: float | None) -> Workload:
    """From the manifest at data.path, or from `items` (and `length`, the mean interactions of a user) when given.

    Raises GenattError when there is neither, or when the data has no such feature.
    """
    longest = config.data.max_len
    if items is not None:
        mean = min(float(longest), length - 1 if length else float(longest))
        said = f"{length:g} interactions a user" if length else f"every window {longest} long"
        features = {one.name: _assumed(one) for one in config.features}
        return Workload(items, max(1.0, mean), longest, 0, f"--items {items:,}, {said}", features)
    from data_pipeline.format import load_manifest

    try:
        manifest = load_manifest(config.data.path)
    except GenattError as error:
        raise GenattError(f"{error}; or plan without data by --items V (and --length N)") from None
    mean = manifest.num_interactions / max(1, manifest.num_users)
    held_out = 2 if "leave" in str(manifest.split).lower() else 0
    whole = max(1.0, mean - held_out - 1)
    positions = whole if config.data.windows == "all" else min(float(longest), whole)
    return Workload(
        manifest.num_items,
        min(positions, float(longest)),
        longest,
        manifest.num_interactions,
        f"{config.data.path}",
        _counted(config.features, FeatureReader.of(config.features, config.data.path, manifest)),
    )


def _assumed(feature: Feature) -> FeatureSize:
    """Without data: one row each position, of as many as the configuration tells."""
    if isinstance(feature, ContextFeature):
        return FeatureSize(CONTEXTS[feature.column][1], 1.0)
    return FeatureSize((feature.buckets or _ASSUMED_VALUES) + 1, float(feature.max_values or 1))


def _counted(features: Sequence[Feature], reader: FeatureReader) -> dict[str, FeatureSize]:
    """values: the mean over items, every item equally often."""
    rows, found = reader.num_rows, {}
    for feature in features:
        own = reader.values.get(feature.name)
        found[feature.name] = FeatureSize(rows[feature.name], float(np.diff(own.first)[1:].mean()) if own else 1.0)
    return found


def shares(config: RunConfig, load: Workload, world_size: int) -> tuple[Share, Share]:
    """(the heaviest a rank can meet: all windows at full length; the average one). Both hold the same tokens."""
    tokens = config.training.batch_sequences * load.positions / world_size
    mean = max(1, round(load.positions))
    return (
        Share(max(1, -(-round(tokens) // load.longest)), load.longest),
        Share(max(1, round(tokens / mean)), mean),
    )
