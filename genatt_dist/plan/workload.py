"""How much a rank gets in a step, from the manifest's counts or from what the user says: no sequence is read."""

from __future__ import annotations

from dataclasses import dataclass

from data_pipeline.errors import GenattError
from genatt_dist.config import RunConfig


@dataclass(frozen=True)
class Workload:
    """The data as far as a plan needs it.

    num_items: V. positions: mean of a window; longest: of any. interactions: as stored, 0
    where unknown. source: where this comes from, for the reader.
    """

    num_items: int
    positions: float
    longest: int
    interactions: int
    source: str


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

    Raises GenattError when there is neither.
    """
    longest = config.data.max_len
    if items is not None:
        mean = min(float(longest), length - 1 if length else float(longest))
        said = f"{length:g} interactions a user" if length else f"every window {longest} long"
        return Workload(items, max(1.0, mean), longest, 0, f"--items {items:,}, {said}")
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
        manifest.num_items, min(positions, float(longest)), longest, manifest.num_interactions, f"{config.data.path}"
    )


def shares(config: RunConfig, load: Workload, world_size: int) -> tuple[Share, Share]:
    """(the heaviest a rank can meet: all windows at full length; the average one). Both hold the same tokens."""
    tokens = config.training.batch_sequences * load.positions / world_size
    mean = max(1, round(load.positions))
    return (
        Share(max(1, -(-round(tokens) // load.longest)), load.longest),
        Share(max(1, round(tokens / mean)), mean),
    )
