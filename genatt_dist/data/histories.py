"""Users to rank items for: their histories as the model takes them, and all of a split's users in steps of all ranks.

Legend: B users, N positions (real tokens), S items that users have seen.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from data_pipeline.errors import GenattError
from genatt_dist.data.ahead import BATCHES_AHEAD, ahead
from genatt_dist.data.arrays import Events, Ints, items_of, seconds_of
from genatt_dist.data.device import Read, ids_on, read_on, values_on
from genatt_dist.data.features import FeatureReader
from genatt_dist.data.sequences import Sequences, gather
from genatt_dist.model.jagged import Jagged

_STEPS_AHEAD = 16  # of an evaluation, planned before they are put together


@dataclass(frozen=True)
class Histories:
    """Users to rank items for: their newest positions, what they have seen, and (when known) the true next item.

    items_N: int64; layout: positions; user_B: int64 index of the user (its noise key). seen_row_S, seen_item_S: int64
    pairs (row of the batch, item) to leave out. target_B: int64, or None. features: what the positions read of each.
    """

    items_N: Tensor
    layout: Jagged
    user_B: Tensor
    seen_row_S: Tensor
    seen_item_S: Tensor
    target_B: Tensor | None
    features: dict[str, Read] = field(default_factory=dict)

    @staticmethod
    def of(
        events: Events,
        first: Ints,
        end: Ints,
        users: Ints,
        max_len: int,
        device: torch.device,
        targets: Ints | None = None,
        features: FeatureReader | None = None,
    ) -> Histories:
        """Histories events[first[i]:end[i]]; the model sees the newest max_len items, all are seen.

        features: of the data set the model was trained on; without times in `events` the context is unknown.
        """
        lengths = np.minimum(end - first, max_len)
        shown, items = gather(events, end - lengths, lengths), items_of(events)
        ids = items_of(shown)
        bags = features.bags(ids, lengths, seconds_of(shown)) if features is not None else {}
        return Histories(
            items_N=ids_on(ids, device),
            layout=Jagged.of(values_on(lengths, device), int(lengths.max()), int(lengths.sum())),
            user_B=values_on(users, device),
            seen_row_S=torch.from_numpy(np.repeat(np.arange(len(users)), end - first)).to(device),
            seen_item_S=ids_on(gather(items, first, end - first), device),
            target_B=None if targets is None else values_on(targets, device),
            features=read_on(bags, device),
        )


def evaluation_batches(
    sequences: Sequences, split: str, max_len: int, batch_users: int, rank: int, world_size: int, device: torch.device
) -> Generator[Histories, None, None]:
    """This rank's histories of every user that has a target in `split` (`valid` or `test`), in steps all ranks
    share. A rank reads the row groups of its own users only, ahead of the steps.
    """
    users = np.flatnonzero(sequences.has_target(split))
    if len(users) < world_size:
        raise GenattError(
            f"{len(users)} users have a {split} item, fewer than world_size={world_size}: evaluate on fewer ranks"
        )
    steps = min(-(-len(users) // batch_users), len(users) // world_size)
    end = sequences.history_end(split)

    def wanted() -> Iterator[tuple[Ints, Ints, Ints]]:
        for step in np.array_split(users, max(1, steps)):
            mine = np.array_split(step, world_size)[rank]
            yield mine, sequences.offsets[mine], end[mine] + 1 - sequences.offsets[mine]

    read = ahead(sequences.slices(wanted(), _STEPS_AHEAD), BATCHES_AHEAD, "evaluation batch")
    try:
        for mine, events, first in read:
            target = first + end[mine] - sequences.offsets[mine]
            items = items_of(events)[target].astype(np.int64)
            yield Histories.of(events, first, target, mine, max_len, device, items, sequences.features)
    finally:
        read.close()
