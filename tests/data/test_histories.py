"""What the model sees, what is left out and what is asked for, for each user that has held-out items."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_data import histories, numbered, sequences_of, write_prepared

from data_pipeline.errors import GenattError
from data_pipeline.splits import TimePoint
from genatt_dist.data.histories import Histories, evaluation_batches
from genatt_dist.data.sequences import Sequences, gather

CPU = torch.device("cpu")
LISTS = [[5], [1, 2], [4, 3, 9], [7, 7, 8, 1, 2, 6, 5], [2, 9, 1, 2]]


def by_user(sequences: Sequences, split: str, batch_users: int = 2, ranks: int = 1) -> dict[int, tuple]:
    """user → (what the model sees, what is left out, target)."""
    found = {}
    for rank in range(ranks):
        for batch in evaluation_batches(sequences, split, 4, batch_users, rank, ranks, CPU):
            for row, user in enumerate(batch.user_B.tolist()):
                shown = batch.items_N[batch.layout.row_N == row].tolist()
                seen = batch.seen_item_S[batch.seen_row_S == row].tolist()
                assert batch.target_B is not None
                assert user not in found
                found[user] = (shown, seen, int(batch.target_B[row]))
    return found


def test_valid_history_is_the_training_part() -> None:
    assert by_user(sequences_of(LISTS), "valid") == {
        2: ([4], [4], 3),
        3: ([7, 8, 1, 2], [7, 7, 8, 1, 2], 6),
        4: ([2, 9], [2, 9], 1),
    }


def test_test_history_contains_the_valid_item() -> None:
    assert by_user(sequences_of(LISTS), "test") == {
        2: ([4, 3], [4, 3], 9),
        3: ([8, 1, 2, 6], [7, 7, 8, 1, 2, 6], 5),
        4: ([2, 9, 1], [2, 9, 1], 2),
    }


@pytest.mark.parametrize("batch_users", [1, 2, 50])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_every_user_with_a_target_comes_once_whatever_the_batches_and_ranks(batch_users: int, ranks: int) -> None:
    sequences = sequences_of(LISTS)
    assert by_user(sequences, "test", batch_users, ranks) == by_user(sequences, "test")


def test_all_ranks_take_equally_many_steps() -> None:
    """A sharded table is asked by all ranks at once: a rank with fewer steps would leave the others waiting."""
    sequences = numbered([3] * 7)
    for size in (1, 2, 3, 7):
        steps = {len(list(evaluation_batches(sequences, "valid", 4, size, rank, 3, CPU))) for rank in range(3)}
        assert len(steps) == 1


def test_more_ranks_than_users_to_evaluate_is_refused() -> None:
    with pytest.raises(GenattError, match="3 users have a valid item, fewer than world_size=4"):
        next(evaluation_batches(sequences_of(LISTS), "valid", 4, 2, 0, 4, CPU))


def test_short_users_train_with_all_they_have() -> None:
    sequences = sequences_of(LISTS)
    for split in ("valid", "test"):
        assert sequences.has_target(split).tolist() == [False, False, True, True, True]
    assert (sequences.history_end("train") - sequences.offsets[:-1]).tolist() == [1, 2, 1, 5, 2]
    assert (sequences.offsets[1:] - sequences.history_end("test")).tolist() == [0, 0, 1, 1, 1]


def test_targets_of_another_split_are_where_the_index_says(tmp_path: Path) -> None:
    """By time: interaction number i of a user is at time i; 2 and 3 are for validation, later ones for testing."""
    lists = [[1], [1, 2], [4, 3, 9], [7, 7, 8, 1, 2, 6, 5], [2, 9, 1, 2]]
    write_prepared(tmp_path, lists, split=TimePoint(valid_from=2, test_from=4), num_shards=1)
    sequences = Sequences.read(str(tmp_path))
    assert sequences.train.tolist() == [1, 2, 2, 2, 2]
    assert sequences.has_target("valid").tolist() == [False, False, True, True, True]
    assert sequences.has_target("test").tolist() == [False, False, False, True, False]
    items = sequences.take(sequences.offsets[:-1], sequences.lengths)[0]
    for split, places in (("valid", {2: 2, 3: 2, 4: 2}), ("test", {3: 4})):
        found = by_user(sequences, split)
        assert found.keys() == places.keys()
        for user, place in places.items():
            mine = items[sequences.offsets[user] : sequences.offsets[user + 1]].tolist()
            assert found[user] == (mine[max(0, place - 4) : place], mine[:place], mine[place])


def test_reading_gives_back_what_was_prepared(prepared: Path, prepared_text: Path) -> None:
    lists = histories()
    for path, name in ((prepared, lambda item: item), (prepared_text, lambda item: f"{item:05d}")):
        sequences = Sequences.read(str(path), verify=True)
        words = sequences_words(path, sequences)
        items, _ = sequences.take(sequences.offsets[:-1], sequences.lengths)
        for index, user in enumerate(sequences.user_ids.to_pylist()):
            number = int(str(user).lstrip("u")) % 100
            dense = items[sequences.offsets[index] : sequences.offsets[index + 1]]
            assert [words[int(item)] for item in dense] == [name(item) for item in lists[number]]
        assert sequences.num_users == len(lists)


def sequences_words(path: Path, sequences: Sequences) -> dict[int, object]:
    from data_pipeline.format import read_vocabulary

    rows = read_vocabulary(str(path), sequences.manifest).to_pylist()
    counted = np.zeros(sequences.num_items + 1, np.int64)
    ends = sequences.history_end("train")
    np.add.at(counted, sequences.take(sequences.offsets[:-1], ends - sequences.offsets[:-1])[0], 1)
    assert sequences.popularity.tolist() == counted.tolist()  # of the training part alone
    return {row["dense_id"]: row["item_id"] for row in rows}


def test_gather_concatenates_slices() -> None:
    items = np.arange(10, dtype=np.int32)
    assert gather(items, np.array([7, 0, 3]), np.array([2, 0, 4])).tolist() == [7, 8, 3, 4, 5, 6]
    assert gather(items, np.array([], np.int64), np.array([], np.int64)).tolist() == []


def test_histories_without_targets_have_none() -> None:
    items = np.array([1, 2, 3], np.int32)
    asked = Histories.of(items, np.array([0]), np.array([3]), np.array([9]), 2, CPU)
    assert asked.target_B is None
    assert asked.items_N.tolist() == [2, 3]
    assert asked.seen_item_S.tolist() == [1, 2, 3]
    assert asked.user_B.tolist() == [9]
