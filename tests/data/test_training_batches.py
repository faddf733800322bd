"""Every item is trained on as often as it should be, and the global batches know nothing of ranks."""

from collections import Counter
from itertools import chain

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_data import all_windows, numbered, sequences_of

from data_pipeline.errors import GenattError
from genatt_dist.config import DataConfig, TrainingConfig
from genatt_dist.data.batches import Batch, TrainingBatches

CPU = torch.device("cpu")
LENGTHS = [1, 2, 3, 4, 30, 7, 2, 12, 5, 5, 5, 9, 18, 3, 6, 2, 11, 4, 8, 21]

some_lengths = st.lists(st.integers(1, 25), min_size=1, max_size=40).filter(lambda lengths: max(lengths) > 3)


def plan(lengths: list[int] | None = None, max_len: int = 5, windows: str = "all", **training: int) -> TrainingBatches:
    targets = "last" if training.pop("last", 0) else "all"
    data = DataConfig(path="-", max_len=max_len, windows=windows, targets=targets)  # type: ignore[arg-type]
    settings = TrainingConfig(**({"batch_sequences": 4} | training))  # type: ignore[arg-type]
    return TrainingBatches.plan(numbered(lengths or LENGTHS), data, settings)


def trained_targets(batches: list[Batch]) -> Counter[int]:
    chosen = [batch.targets_N if batch.chosen is None else batch.targets_N[batch.chosen] for batch in batches]
    return Counter(torch.cat(chosen).tolist())


def every_window(batches: TrainingBatches) -> list[int]:
    """The ids of all windows, by the rule."""
    return all_windows(batches).id_B.tolist()


def training_part(lengths: list[int]) -> list[list[int]]:
    """Items of each user that may be trained on, by the rule: all but two of those who have three."""
    ends = np.cumsum(lengths)
    return [
        list(range(end - length + 1, end + 1 - (2 if length >= 3 else 0)))
        for length, end in zip(lengths, ends, strict=True)
    ]


@settings(max_examples=60, deadline=None)
@given(some_lengths, st.integers(1, 9), st.integers(1, 6), st.integers(1, 3), st.integers(0, 5))
def test_all_windows_train_every_item_but_the_first_of_a_user_once(lengths, max_len, size, world_size, epoch):
    batches = plan(lengths, max_len, batch_sequences=size)
    if min(map(len, batches.epoch(epoch))) < world_size:
        with pytest.raises(GenattError, match=f"sequences for {world_size} ranks: raise training.batch_sequences"):
            list(batches.iterate(epoch, 0, 0, world_size, CPU))
        return
    parts = [part for rank in range(world_size) for part in batches.iterate(epoch, 0, rank, world_size, CPU)]
    assert trained_targets(parts) == Counter(item for items in training_part(lengths) for item in items[1:])


@settings(max_examples=30, deadline=None)
@given(some_lengths, st.integers(1, 9), st.integers(0, 5))
def test_last_windows_train_the_newest_items_of_each_user_once(lengths, max_len, epoch):
    batches = list(plan(lengths, max_len, "last").iterate(epoch, 0, 0, 1, CPU))
    expected = Counter(item for items in training_part(lengths) for item in items[1:][-max_len:])
    assert trained_targets(batches) == expected


def test_only_the_last_target_of_a_window_where_asked() -> None:
    found = list(plan(windows="last", last=1).iterate(0, 0, 0, 1, CPU))
    assert trained_targets(found) == Counter(items[-1] for items in training_part(LENGTHS) if len(items) > 1)
    for batch in found:
        assert batch.num_targets == batch.num_sequences == len(batch.window_B)
        assert batch.num_tokens == len(batch.layout.row_N)


def test_a_window_is_consecutive_items_of_one_user() -> None:
    """Inputs and targets are neighbours: no window crosses from one user to the next."""
    owner = np.repeat(np.arange(len(LENGTHS)), LENGTHS)
    for batch in plan().iterate(0, 0, 0, 1, CPU):
        inputs, targets = batch.items_M[batch.input_index_N], batch.targets_N
        assert torch.equal(inputs + 1, targets)
        assert np.array_equal(owner[inputs.numpy() - 1], owner[targets.numpy() - 1])
        assert int(batch.layout.lengths_B.max()) <= 5
        first = inputs[batch.layout.position_N == 0]
        assert (owner[first.numpy() - 1] == (batch.window_B >> 20).numpy()).all()


@pytest.mark.parametrize("windows", ["all", "last"])
def test_no_held_out_item_is_ever_trained_on(windows: str) -> None:
    allowed = {item for items in training_part(LENGTHS) for item in items}
    for epoch in range(3):
        for batch in plan(windows=windows).iterate(epoch, 0, 0, 1, CPU):
            assert set(batch.items_M.tolist()) <= allowed


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_global_batches_are_the_same_for_every_world_size(world_size: int) -> None:
    """Same windows in the same order of batches; the parts are disjoint, complete and know the global sums."""
    batches = plan(batch_sequences=8)
    alone = list(batches.iterate(2, 0, 0, 1, CPU))
    parts = [list(batches.iterate(2, 0, rank, world_size, CPU)) for rank in range(world_size)]
    for whole, *of_ranks in zip(alone, *parts, strict=True):
        windows = torch.cat([part.window_B for part in of_ranks]).tolist()
        assert sorted(windows) == sorted(whole.window_B.tolist())
        assert trained_targets(of_ranks) == trained_targets([whole])
        for part in of_ranks:
            assert (part.num_tokens, part.num_targets) == (whole.num_tokens, whole.num_targets)
            assert part.num_sequences == len(whole.window_B)
        assert sum(len(part.layout.row_N) for part in of_ranks) == whole.num_tokens


@settings(max_examples=40, deadline=None)
@given(some_lengths, st.integers(1, 12), st.integers(2, 4))
def test_ranks_get_equal_tokens_within_one_longest_window(lengths, max_len, world_size):
    batches = plan(lengths, max_len, batch_sequences=12)
    for planned in batches.buffers(0):
        for index, members in enumerate(planned.batches):
            if len(members) >= world_size:
                length_W = planned.windows.length_B
                tokens = [length_W[planned.deal(index, rank, world_size)].sum() for rank in range(world_size)]
                assert max(tokens) - min(tokens) <= length_W[members].max()


def test_batches_hold_equal_tokens_within_one_window() -> None:
    batches = plan([20] * 8 + [6] * 40 + [3] * 60, max_len=9, batch_sequences=8)
    tokens = [batch.length_B.sum() for batch in batches.epoch(0)]
    assert max(tokens) - min(tokens) <= 2 * 9


def test_an_epoch_is_a_function_of_seed_and_number() -> None:
    def windows(batches: TrainingBatches, epoch: int) -> list[list[int]]:
        return [batch.id_B.tolist() for batch in batches.epoch(epoch)]

    one = plan(seed=3)
    assert windows(one, 1) == windows(plan(seed=3), 1)
    assert windows(one, 1) != windows(one, 2)
    assert windows(one, 1) != windows(plan(seed=4), 1)
    for epoch in (1, 2):
        assert sorted(chain.from_iterable(windows(one, epoch))) == every_window(one)


def test_a_resumed_epoch_goes_on_with_the_batches_that_are_left() -> None:
    batches = plan()
    whole = list(batches.iterate(1, 0, 1, 2, CPU))
    for first in (1, len(whole) - 1, len(whole)):
        rest = list(batches.iterate(1, first, 1, 2, CPU))
        assert [one.items_M.tolist() for one in rest] == [one.items_M.tolist() for one in whole[first:]]


@settings(max_examples=60, deadline=None)
@given(some_lengths, st.integers(1, 8), st.integers(1, 5), st.integers(1, 30))
def test_every_epoch_has_the_same_number_of_batches_and_none_is_empty(lengths, size, accumulation, max_len):
    """So that updates are whole: accumulated batches never run over the end of an epoch."""
    if plan(lengths, max_len).num_windows < accumulation:
        with pytest.raises(
            GenattError, match=rf"windows cannot fill training\.accumulation_steps={accumulation} batches"
        ):
            plan(lengths, max_len, batch_sequences=size, accumulation_steps=accumulation)
        return
    batches = plan(lengths, max_len, batch_sequences=size, accumulation_steps=accumulation)
    assert batches.num_batches % accumulation == 0
    for epoch in range(4):
        found = list(batches.epoch(epoch))
        assert len(found) == batches.num_batches
        assert min(map(len, found)) >= 1
        assert sorted(np.concatenate([batch.id_B for batch in found]).tolist()) == every_window(batches)


def test_more_ranks_than_sequences_is_refused_before_anything_starts() -> None:
    batches = plan(batch_sequences=2)
    with pytest.raises(GenattError, match=r"world_size=16 ranks but a global batch holds as few as \d+ sequences"):
        batches.check(16)
    batches.check(1)


def test_the_check_sees_the_smallest_batch_of_every_epoch() -> None:
    """Epochs are shuffled differently; the one with the smallest batch may be any."""
    lengths = (3 + np.random.default_rng(1).geometric(0.15, 300)).clip(max=26).tolist()
    batches = plan(lengths, max_len=24, windows="last", batch_sequences=6)
    least = [min(len(members) for members in batches.epoch(epoch)) for epoch in range(40)]
    assert min(least) < least[0]
    batches.check(least[0])
    with pytest.raises(GenattError, match=f"as few as {min(least)} sequences"):
        batches.check(least[0], 40)


def test_nothing_to_learn_is_an_error() -> None:
    with pytest.raises(GenattError, match="no user has two training interactions"):
        TrainingBatches.plan(sequences_of([[1], [1, 2, 3], [2]]), DataConfig(path="-"), TrainingConfig())
