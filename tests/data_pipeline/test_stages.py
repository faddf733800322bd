"""Each stage, and all of them in one process, against the plain Python reference."""

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from log_reference import Row, prepare_slowly

from data_pipeline import interactions, sequences, vocabulary
from data_pipeline.config import PrepareConfig
from data_pipeline.hashing import hash64
from data_pipeline.splits import LeaveOneOut

int_rows = st.lists(st.tuples(st.integers(-3, 5), st.integers(1, 6), st.integers(0, 4)), min_size=1, max_size=60)
names = st.sampled_from(["", "a", "b", "ab", "é", "7", "007", "日本"])
string_rows = st.lists(st.tuples(names, names, st.integers(0, 3)), min_size=1, max_size=40)

INT_HASHES = [5197578548964807871, 16899028431761561291, 11385487063155714807]
STRING_HASHES = [5197578548964807871, 6091774420334151082, 770431282099768184, 16070332970909293577]


@settings(max_examples=150, deadline=None)
@given(
    rows=int_rows | string_rows,
    duplicates=st.sampled_from(["none", "exact", "consecutive"]),
    min_user=st.integers(1, 4),
    min_item=st.integers(1, 4),
)
def test_stages_together_equal_the_plain_reference(rows: list[Row], duplicates: str, min_user: int, min_item: int):
    expected = prepare_slowly(rows, duplicates, min_user, min_item)
    config = PrepareConfig.model_validate(
        {
            "source": "-",
            "out": "-",
            "duplicates": duplicates,
            "min_user_interactions": min_user,
            "min_item_interactions": min_item,
        }
    )
    frame = pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp"], orient="row").with_row_index("position")
    block = interactions.partition(frame.cast({"position": pl.Int64}), 3)
    shards = [interactions.order(interactions.shard_slice(block, shard), config) for shard in range(3)]
    assert frame.height - sum(shard.height for shard in shards) == expected.dropped_duplicates

    pairs = pl.concat([shard.select("user_id", "item_id") for shard in shards])
    core, dropped = interactions.k_core(pairs, min_user, min_item)
    assert sum(dropped.values()) == expected.dropped_by_core

    items = vocabulary.build(core["item_id"])
    built = pl.concat([sequences.build(shard, items, config) for shard in shards])
    assert {user: (ids, times) for user, ids, times in built.iter_rows()} == expected.sequences
    assert built["user_id"].n_unique() == built.height

    finished = vocabulary.finish(items, sequences.train_counts(built, LeaveOneOut()))
    assert finished.column_names == ["item_id", "dense_id", "count", "train_count"]
    assert [tuple(row.values()) for row in finished.to_pylist()] == expected.items


def test_k_core_repeats_until_stable():
    # Items 1 and 3 are rare; without them both users are too short, and nothing is left.
    pairs = pl.DataFrame({"user_id": [1, 1, 2, 2], "item_id": [1, 2, 2, 3]})
    core, dropped = interactions.k_core(pairs, 2, 2)
    assert core.height == 0
    assert dropped == {"user_too_short": 2, "item_too_rare": 2}


def test_a_shard_does_not_depend_on_the_order_of_blocks():
    config = PrepareConfig(source="-", out="-")
    rows = pl.DataFrame({"shard": 0, "user_id": [1, 1, 1], "item_id": [5, 6, 7], "timestamp": 9, "position": [0, 1, 2]})
    assert interactions.order(rows.reverse(), config).equals(interactions.order(rows, config))


def test_hash_is_the_same_for_ever():
    """Shards and their order hang on these values: another hash would silently be another data set."""
    assert hash64(pa.array([0, 1, -1])).tolist() == INT_HASHES
    assert hash64(pa.array(["", "a", "ab", "é"])).tolist() == STRING_HASHES


def test_hash_of_a_slice_equals_slice_of_hashes():
    for ids in (pa.array(range(50)), pa.array([str(number) * (number % 4) for number in range(50)])):
        assert np.array_equal(hash64(ids[7:30]), hash64(ids)[7:30])


@pytest.mark.parametrize("ids", [pa.array(range(80_000)), pa.array([f"user-{number}" for number in range(80_000)])])
def test_hash_spreads_users_evenly(ids: pa.Array):
    counts = np.bincount(hash64(ids) % np.uint64(8), minlength=8)
    assert abs(counts - 10_000).max() < 500  # five standard deviations
    assert len(set(hash64(ids).tolist())) == 80_000


def test_split_rule():
    split = LeaveOneOut()
    lengths = list(range(1, 7))
    assert [split.train_length(length) for length in lengths] == [1, 2, 1, 2, 3, 4]
    column = pl.DataFrame({"n": lengths}, schema={"n": pl.UInt32}).select(split.train_lengths(pl.col("n")))
    assert column["n"].to_list() == [1, 2, 1, 2, 3, 4]
