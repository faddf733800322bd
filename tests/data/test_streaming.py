"""What is larger than a shuffle buffer: every window once, in an order that neither ranks nor stops change."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_data import all_windows, numbered

from genatt_dist.attention.noise import Purpose, derive
from genatt_dist.config import DataConfig, TrainingConfig
from genatt_dist.data.batches import Batch, TrainingBatches
from genatt_dist.data.shuffle import POOL_BATCHES

CPU = torch.device("cpu")
some_lengths = st.lists(st.integers(1, 25), min_size=1, max_size=60).filter(lambda lengths: max(lengths) > 3)


def plan(
    lengths: list[int],
    row_group_size: int,
    shuffle_windows: int,
    batch_sequences: int = 4,
    max_len: int = 5,
    **data: str,
) -> TrainingBatches:
    section = DataConfig(path="-", max_len=max_len, shuffle_windows=shuffle_windows, **data)  # type: ignore[arg-type]
    training = TrainingConfig(batch_sequences=batch_sequences, seed=3)
    return TrainingBatches.plan(numbered(lengths, row_group_size), section, training)


def skewed(users: int, seed: int = 0) -> list[int]:
    """Lengths of histories: most are short, some reach hundreds."""
    return (3 + np.random.default_rng(seed).pareto(1.2, users) * 8).astype(int).clip(max=400).tolist()


@pytest.fixture(scope="module")
def large() -> TrainingBatches:
    """Some 90 row groups in 5 buffers."""
    return plan(skewed(1400), 16, 270, 16, max_len=50, windows="all")


def told(batch: Batch) -> tuple:
    return batch.items_M.tolist(), batch.window_B.tolist(), batch.num_tokens, batch.num_targets, batch.num_sequences


def test_a_small_data_set_keeps_the_order_of_earlier_versions() -> None:
    """Runs made before there were buffers can be repeated: this is how an epoch was planned then."""
    batches = plan(skewed(900), 16, 10_000, 24, max_len=50)
    whole = all_windows(batches)
    for epoch in range(3):
        key = int(derive(3, int(Purpose.SHUFFLE), epoch)) % (1 << 64)
        random = np.random.Generator(np.random.Philox(key=key))
        shuffled = random.permutation(len(whole))
        num_pools = -(-batches.num_batches // POOL_BATCHES)
        expected: list[np.ndarray] = []
        shares = [len(part) for part in np.array_split(np.arange(batches.num_batches), num_pools)]
        for share, members in zip(shares, np.array_split(shuffled, num_pools), strict=True):
            members = members[np.argsort(whole.length_B[members], kind="stable")]
            filled = np.cumsum(whole.length_B[members])
            cut = np.arange(1, share)
            after = np.maximum.accumulate(np.searchsorted(filled, filled[-1] * cut / share) - cut) + cut
            expected += np.split(members, np.clip(after, cut, len(members) - share + cut))
        order = random.permutation(len(expected))
        found = [batch.id_B.tolist() for batch in batches.epoch(epoch)]
        assert found == [whole.id_B[expected[i]].tolist() for i in order]
        parts = [list(batches.iterate(epoch, 0, rank, 3, CPU)) for rank in range(3)]
        for number, index in enumerate(order):
            turn = np.arange(len(expected[index])) % 6
            for rank in range(3):
                mine = expected[index][::-1][np.minimum(turn, 5 - turn) == rank]
                assert parts[rank][number].window_B.tolist() == whole.id_B[mine].tolist()


@settings(max_examples=80, deadline=None)
@given(some_lengths, st.integers(1, 9), st.integers(1, 30), st.integers(1, 5), st.sampled_from(["all", "last"]))
def test_every_window_is_in_one_batch_of_an_epoch(lengths, row_group_size, shuffle_windows, size, windows):
    batches = plan(lengths, row_group_size, shuffle_windows, size, windows=windows)
    expected = all_windows(batches).id_B.tolist()
    for epoch in range(3):
        found = list(batches.epoch(epoch))
        assert len(found) == batches.num_batches
        assert min(map(len, found)) >= 1
        assert sorted(np.concatenate([batch.id_B for batch in found]).tolist()) == expected


def test_buffers_are_of_neighbours_in_a_random_order_of_row_groups(large: TrainingBatches) -> None:
    buffers = list(large.buffers(1))
    assert len(buffers) == 5
    assert [after.number - before.number for before, after in pairwise(buffers)] == [
        len(planned.batches) for planned in buffers[:-1]
    ]
    first_item_G = large.sequences.groups.first_item_G
    groups = [np.unique(np.searchsorted(first_item_G, one.windows.start_B, "right") - 1) for one in buffers]
    assert sorted(np.concatenate(groups).tolist()) == list(range(len(first_item_G) - 1))  # each in one buffer
    assert all(np.ptp(one) > len(first_item_G) // 2 for one in groups)  # and drawn from all of them
    again = [planned.windows.id_B.tolist() for planned in large.buffers(1)]
    assert again == [planned.windows.id_B.tolist() for planned in buffers]
    assert again != [planned.windows.id_B.tolist() for planned in large.buffers(2)]


def test_an_epoch_goes_on_exactly_from_every_cursor(large: TrainingBatches) -> None:
    whole = [told(batch) for batch in large.iterate(1, 0, 1, 2, CPU)]
    assert len(whole) == large.num_batches
    for first in range(large.num_batches + 1):
        assert [told(batch) for batch in large.iterate(1, first, 1, 2, CPU)] == whole[first:]


def test_nothing_before_the_cursor_is_read(large: TrainingBatches, monkeypatch: pytest.MonkeyPatch) -> None:
    last = list(large.buffers(0))[-1]
    groups = np.searchsorted(large.sequences.groups.first_item_G, last.windows.start_B, "right") - 1
    read: list[int] = []
    along = type(large.sequences.groups).along

    def watching(store, order):
        return along(store, (one for one in order if one is None or read.append(one[1]) is None))

    monkeypatch.setattr(type(large.sequences.groups), "along", watching)
    list(large.iterate(0, last.number + 1, 0, 1, CPU))
    assert read
    assert set(read) <= set(groups.tolist())


def test_buffers_are_planned_when_they_come_near(large: TrainingBatches, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planning all that fits into memory first would be a long wait for the first batch on many ranks."""
    planned: list[int] = []
    buffers = TrainingBatches.buffers

    def watching(self, epoch, first=0):
        for one in buffers(self, epoch, first):
            planned.append(one.number)
            yield one

    monkeypatch.setattr(TrainingBatches, "buffers", watching)
    stream = large.iterate(0, 0, 0, 1, CPU)
    next(stream)
    assert len(planned) == 2
    list(stream)
    assert len(planned) == 5


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_the_global_order_is_the_same_for_every_world_size(world_size: int, large: TrainingBatches) -> None:
    planned = list(large.epoch(2))
    parts = [list(large.iterate(2, 0, rank, world_size, CPU)) for rank in range(world_size)]
    for batch, *of_ranks in zip(planned, *parts, strict=True):
        assert sorted(window for part in of_ranks for window in part.window_B.tolist()) == sorted(batch.id_B.tolist())
        assert sum(len(part.layout.row_N) for part in of_ranks) == batch.length_B.sum()
        for part in of_ranks:
            assert (part.num_tokens, part.num_sequences) == (batch.length_B.sum(), len(batch))


@pytest.mark.parametrize("whole", [True, False], ids=["one-buffer", "buffers"])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_ranks_get_equal_tokens_within_5_percent(world_size: int, whole: bool) -> None:
    """On skewed lengths; but for the last batch of an epoch."""
    batches = plan(skewed(8_000), 64, 65_536 if whole else 2_000, 100 * world_size, max_len=50)
    for planned in batches.buffers(0):
        assert planned.near != whole
        for index in range(len(planned.batches)):
            if planned.number + index < batches.num_batches - 1:
                parts = [planned.deal(index, rank, world_size) for rank in range(world_size)]
                tokens = [planned.windows.length_B[part].sum() for part in parts]
                assert max(tokens) <= 1.05 * min(tokens)


def test_batches_of_all_buffers_hold_equal_tokens() -> None:
    batches = plan(skewed(8_000), 64, 2_000, 128, max_len=50)
    tokens = np.array([batch.length_B.sum() for batch in batches.epoch(0)])
    assert len(tokens) > 50
    assert np.abs(tokens / tokens.mean() - 1).max() < 0.1


def test_the_check_looks_into_all_buffers_where_the_first_comes_near(large: TrainingBatches) -> None:
    least = min(len(batch) for epoch in range(3) for batch in large.epoch(epoch))
    large.check(least, 3)
    with pytest.raises(Exception, match=f"holds as few as {least} sequences"):
        large.check(least + 1, 3)
