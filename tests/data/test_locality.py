"""What the ranks read of a data set that is larger than a shuffle buffer: nearly only row groups of their own.

Simulated from the plan alone, so that a thousand ranks need none.
"""

import numpy as np
import pytest

from data_pipeline.format import Manifest
from genatt_dist.config import DataConfig, TrainingConfig
from genatt_dist.data.batches import TrainingBatches
from genatt_dist.data.sequences import Sequences

USERS_OF_A_ROW_GROUP = 1024


def amplification(world_size: int, sequences_of_a_rank: int) -> float:
    """Bytes of the row groups that ranks read for the first buffer, all ranks together, by the bytes there are."""
    users = max(200_000, 20 * sequences_of_a_rank * world_size)
    length = (3 + np.random.default_rng(0).geometric(0.02, users)).clip(max=1000)
    manifest = Manifest.model_construct(name="lengths", num_items=1)  # type: ignore[call-arg]
    places = (length - 2, length - 2, length - 1)
    sequences = Sequences.of(np.zeros(0, np.int32), length, places, manifest, USERS_OF_A_ROW_GROUP)
    training = TrainingConfig(batch_sequences=sequences_of_a_rank * world_size)
    planned = next(TrainingBatches.plan(sequences, DataConfig(path="-", max_len=200), training).buffers(0))
    first_item_G = sequences.groups.first_item_G
    group_W = np.searchsorted(first_item_G, planned.windows.start_B, "right") - 1
    size_G = np.diff(first_item_G)
    ranks = np.unique(np.linspace(0, world_size - 1, min(world_size, 16)).astype(int))
    read = 0
    for rank in ranks.tolist():
        mine = [planned.deal(index, rank, world_size) for index in range(len(planned.batches))]
        read += size_G[np.unique(group_W[np.concatenate(mine)])].sum()
    return read * world_size / len(ranks) / size_G[np.unique(group_W)].sum()


@pytest.mark.parametrize(
    ("world_size", "sequences_of_a_rank", "bound"),
    [(1, 256, 1.0), (2, 256, 1.1), (8, 256, 1.3), (64, 256, 1.5), (8, 64, 1.6), (64, 64, 2.5), (1024, 64, 3.2)],
)
def test_ranks_read_little_more_than_their_own_row_groups(
    world_size: int, sequences_of_a_rank: int, bound: float
) -> None:
    assert amplification(world_size, sequences_of_a_rank) <= bound


@pytest.mark.exhaustive
def test_a_thousand_ranks_of_256_sequences_read_less_than_twice() -> None:
    assert amplification(1024, 256) <= 2
