"""Each stage, and all of them in one process, against the plain Python reference."""

from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from log_reference import Row, prepare_slowly

from data_pipeline import partition, tasks, vocabulary
from data_pipeline.clean import clean
from data_pipeline.config import PrepareConfig
from data_pipeline.format import read_index, read_shard
from data_pipeline.hashing import hash64
from data_pipeline.k_core import Items
from data_pipeline.narrow import narrow, widen
from data_pipeline.order import order
from data_pipeline.readers import Chunk, Kinds, Plan
from data_pipeline.sequences import Sequences

int_rows = st.lists(st.tuples(st.integers(-3, 5), st.integers(1, 6), st.integers(0, 4)), min_size=1, max_size=60)
names = st.sampled_from(["", "a", "b", "ab", "é", "7", "007", "日本"])
string_rows = st.lists(st.tuples(names, names, st.integers(0, 3)), min_size=1, max_size=40)
small_numbers = st.integers(1, 4)

INT_HASHES = [5197578548964807871, 16899028431761561291, 11385487063155714807]
STRING_HASHES = [5197578548964807871, 6091774420334151082, 770431282099768184, 16070332970909293577]


def a_plan(**fields: Any) -> Plan:
    return Plan(files=(), kinds=Kinds(user="int64", item="int64", time="number"), chunks=(Chunk(0),), **fields)


def a_config(**changes: Any) -> PrepareConfig:
    return PrepareConfig.model_validate({"source": "-", "out": "-", **changes})


def frame_of(rows: list[Row]) -> pl.DataFrame:
    return pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp"], orient="row")


def blocks_of(frame: pl.DataFrame, size: int, num_shards: int) -> list[pa.Table]:
    return [partition.tag(piece, {}, num_shards) for piece in frame.iter_slices(size)]


@settings(max_examples=150, deadline=None)
@given(
    rows=int_rows | string_rows,
    duplicates=st.sampled_from(["none", "exact", "consecutive"]),
    min_user=small_numbers,
    min_item=small_numbers,
    min_count=small_numbers,
    rare=st.sampled_from(["drop", "bucket"]),
    max_history=st.none() | small_numbers,
    block=st.integers(1, 60),
)
def test_stages_together_equal_the_plain_reference(
    rows: list[Row], duplicates: str, min_user: int, min_item: int, min_count: int, rare: str, max_history: int | None,
    block: int, tmp_path_factory: pytest.TempPathFactory,
):  # fmt: skip
    config = a_config(
        duplicates=duplicates,
        min_user_interactions=min_user,
        min_item_interactions=min_item,
        min_count=min_count,
        out_of_vocabulary=rare,
        max_history=max_history,
    )
    expected = prepare_slowly(rows, config)
    directory = str(tmp_path_factory.mktemp("out"))

    num_shards = 3
    split = [partition.split([one], num_shards) for one in blocks_of(frame_of(rows), block, num_shards)]
    assert sum(counted.rows for counted, _ in split) == len(rows)
    shards = [order([slices[number] for _, slices in split], config) for number in range(num_shards)]
    assert sum(shard.duplicates for shard in shards) == expected.dropped["duplicates"]

    catalogue = vocabulary.merge([pl.DataFrame(shard.items) for shard in shards]).sort("item_id")
    codes = [tasks.encode(shard.items, catalogue.to_arrow()) for shard in shards]
    items = Items(catalogue["count"].to_numpy().copy(), min_item)
    alive: list[Any] = [None] * num_shards
    users = 1
    while users:
        items.bury()
        users = 0
        for number, shard in enumerate(shards):
            removed, alive[number] = tasks.bury(
                shard.item, shard.users, codes[number], alive[number], items.alive, min_user, None
            )
            items.subtract(removed)
            users += removed.users
    assert len(rows) - expected.dropped["duplicates"] - int(items.counts[items.alive].sum()) == expected.dropped["core"]

    words = vocabulary.build(catalogue["item_id"], np.where(items.alive, items.counts, 0), config)
    train = np.zeros(words.size + 1, np.int64)
    found: dict[Any, Any] = {}
    dropped = dict.fromkeys(("below_min_count", "beyond_max_history"), 0)
    for number, shard in enumerate(shards):
        written = tasks.write(
            number, shard.item, shard.columns, shard.users, codes[number], alive[number], words.dense_of_code,
            items.alive, directory, config, words.out_of_vocabulary, None,
        )  # fmt: skip
        dropped |= {reason: dropped[reason] + count for reason, count in written.dropped.items()}
        np.add.at(train, written.train.ids, written.train.counts)
        if written.file is None:
            continue
        table, index = read_shard(directory, written.file), read_index(directory, written.file)
        found |= {row["user_id"]: (row["item_ids"], row["timestamps"]) for row in table.to_pylist()}
        assert index["length"].to_pylist() == [len(row) for row in table["item_ids"].to_pylist()]
    assert found == expected.sequences
    assert dropped == {reason: expected.dropped[reason] for reason in dropped}
    finished = vocabulary.finish(words.table, train)
    assert finished.column_names == ["item_id", "dense_id", "count", "train_count"]
    assert [tuple(row.values()) for row in finished.to_pylist()] == expected.items


def core(pairs: list[tuple[int, int]], min_user: int, min_item: int, exempt: set[int] = frozenset()) -> tuple:
    """Living (user, item) rows and what the rounds dropped, in one shard."""
    rows = frame_of([(user, item, 0) for user, item in pairs])
    shard = order([partition.split([partition.tag(rows, {}, 1)], 1)[1][0]], a_config())
    ids = shard.items["item_id"].to_numpy()
    items = Items(shard.items["count"].to_numpy().copy(), min_item, np.isin(ids, list(exempt)))
    codes, alive, users, rounds = np.arange(len(ids), dtype=np.int32), None, 1, []
    while users:
        buried = items.bury()
        removed, alive = tasks.bury(shard.item, shard.users, codes, alive, items.alive, min_user, None)
        items.subtract(removed)
        users = removed.users
        rounds.append((buried, users))
    return dict(zip(ids.tolist(), np.where(items.alive, items.counts, 0).tolist(), strict=True)), rounds


def test_k_core_repeats_until_stable():
    # Items 1 and 3 are rare; without them both users are too short, and nothing is left.
    assert core([(1, 1), (1, 2), (2, 2), (2, 3)], 2, 2) == ({1: 0, 2: 0, 3: 0}, [(2, 2), (1, 0)])


def test_exempt_items_never_die():
    assert core([(1, 1), (1, 2), (2, 2), (2, 3)], 1, 2, exempt={1}) == ({1: 1, 2: 2, 3: 0}, [(1, 0)])


@given(rows=int_rows, size=st.integers(1, 60), weighted=st.booleans())
def test_shards_do_not_depend_on_the_blocks(rows: list[Row], size: int, weighted: bool):
    frame = frame_of(rows)
    if weighted:
        frame = frame.with_columns(weight=pl.int_range(pl.len()).cast(pl.Float32))
    whole = partition.split(blocks_of(frame, len(rows), 4), 4)[1]
    parts = [partition.split([one], 4)[1] for one in blocks_of(frame, size, 4)]
    for number, shard in enumerate(whole):
        assert pa.concat_tables([widen(part[number]) for part in parts]).equals(widen(shard))
    together = partition.split(blocks_of(frame, size, 4), 4)[1]
    assert all(widen(one).equals(widen(other)) for one, other in zip(together, whole, strict=True))


@pytest.mark.parametrize("ids", [[1, 2, 3, 4], ["a", "b", "c", "d"]])
def test_range_and_weights_drop_rows_and_say_so(ids: list):
    rows = pl.DataFrame(
        {
            "user_id": ids,
            "item_id": ids,
            "timestamp": [1, 2, 3, 4],
            "event": ["cart", "view", "seen", "cart"],
        }
    )
    config = a_config(event_column="event", event_weights={"cart": 2.5, "view": 0})
    kept, dropped = clean(rows, a_plan(time_from=1, time_to=4), config)
    assert kept["weight"].to_list() == [2.5]
    assert dropped == {"outside_time_range": 1, "event_without_weight": 2}
    # Counts travel with the rows, through any number of blocks.
    blocks = [partition.tag(kept, dropped, 3), partition.tag(kept.clear(), dropped, 3)]
    counted, slices = partition.split(blocks, 3)
    assert counted == partition.Counted(1, {"outside_time_range": 2, "event_without_weight": 4})
    assert sum(part.num_rows for part in slices) == 1


@settings(max_examples=60, deadline=None)
@given(rows=int_rows)
@example(rows=[(1, 2, -(1 << 62)), (1, 3, 1 << 62), (1, 4, -5)])
def test_wide_times_sort_like_narrow_ones(rows: list[Row]):
    """Times, users and rows that do not fit into 64 bits take another sort."""
    frame = frame_of(rows)
    wide = frame.with_columns(pl.col("timestamp") * (1 << 55))
    one, other = (order([narrow(table.to_arrow())], a_config()) for table in (frame, wide))
    if max(abs(row[2]) for row in rows) < 1 << 8:  # else the wide ones overflow
        assert other.item.tolist() == one.item.tolist()
    table = pl.DataFrame(widen(other.columns)).with_columns(
        user=np.repeat(np.arange(other.users.num_rows), other.users["rows"])
    )
    assert table.select("user", "timestamp").equals(table.sort("user", "timestamp").select("user", "timestamp"))


def test_hash_buckets_need_no_vocabulary():
    config = a_config(hash_buckets=3)
    ids = pl.Series("item_id", [f"item {number}" for number in range(10)])
    words = vocabulary.build(ids, np.arange(10), config)
    assert words.size == 3
    assert set(words.dense_of_code[1:].tolist()) <= {1, 2, 3}
    assert words.dense_of_code[0] == 0  # no row
    assert words.buckets is not None
    fewer = vocabulary.build(ids[5:], np.arange(5, 10), config)  # an item's bucket does not depend on the others
    assert fewer.dense_of_code.tolist() == words.dense_of_code[5:].tolist()
    assert words.table["count"].sum() == words.buckets["count"].sum() == 45
    best = words.buckets.sort("count", descending=True).unique("dense_id", keep="first").sort("dense_id")
    named = words.table.drop_nulls("item_id")
    assert named["item_id"].to_list() == best["item_id"].to_list()


@given(lengths=st.lists(st.integers(1, 6), max_size=8), limit=st.none() | st.integers(1, 7))
def test_the_newest_rows_stay(lengths: list[int], limit: int | None):
    total = sum(lengths)
    rows = Sequences(
        pa.array(np.arange(len(lengths))), np.array(lengths, np.int64), np.arange(1, total + 1, dtype=np.int32),
        np.arange(total),
    )  # fmt: skip
    lists = rows.table()["item_ids"].to_pylist()
    kept = rows.newest(limit).table()
    assert kept["item_ids"].to_pylist() == [items[-limit:] if limit else items for items in lists]
    assert kept["user_id"].to_pylist() == list(range(len(lengths)))


def test_hash_is_the_same_for_ever():
    """Shards and their order hang on these values: another hash would silently be another data set."""
    ids = pa.array([0, 1, -1])
    assert hash64(ids).tolist() == INT_HASHES
    assert ids.to_pylist() == [0, 1, -1]
    assert hash64(pa.array(["", "a", "ab", "é"])).tolist() == STRING_HASHES


def test_hash_of_a_slice_equals_slice_of_hashes():
    for ids in (pa.array(range(50)), pa.array([str(number) * (number % 4) for number in range(50)])):
        assert np.array_equal(hash64(ids[7:30]), hash64(ids)[7:30])


@pytest.mark.parametrize("ids", [pa.array(range(80_000)), pa.array([f"user-{number}" for number in range(80_000)])])
def test_hash_spreads_users_evenly(ids: pa.Array):
    counts = np.bincount(hash64(ids) % np.uint64(8), minlength=8)
    assert abs(counts - 10_000).max() < 500  # five standard deviations
    assert len(set(hash64(ids).tolist())) == 80_000


@given(
    st.lists(st.integers(-(2**63), 2**63 - 1), max_size=20) | st.lists(st.integers(2**62, 2**62 + 2**32), max_size=20),
    st.integers(0, 20),
)
def test_narrow_loses_nothing(values: list[int], start: int):
    table = pa.table({"a": pa.array(values, pa.int64()), "b": pa.array(map(str, values), pa.string())})
    narrowed = narrow(table)
    assert widen(narrowed).equals(table)
    assert widen(narrowed[start:]).equals(table[start:])
    if values and max(values) - min(values) < 2**32:
        assert narrowed.schema.field("a").type == pa.uint32()
