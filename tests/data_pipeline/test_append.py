"""Versions made by appending, against preparing everything at once and against plain Python."""

import hashlib
import json
import random
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from in_process import prepare, without_ray

from data_pipeline import prepare as prepare_module
from data_pipeline import vocabulary
from data_pipeline.append import Parent, drift_text
from data_pipeline.config import PrepareConfig
from data_pipeline.errors import GenattError
from data_pipeline.format import Manifest, load_manifest, manifest_hash, read_index, read_shard, read_vocabulary, verify
from data_pipeline.vocabulary import Tally

Options = Callable[..., PrepareConfig]
Log = Callable[..., str]
Row = tuple[Any, ...]  # user, item, time[, event]
COLUMNS = ["user_id", "item_id", "timestamp", "event"]
EVENTS = {"view": 1.0, "buy": 2.5}


def write(path: Path, rows: Sequence[Row], types: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pl.DataFrame(rows, schema={name: types.get(name, pl.String) for name in COLUMNS}, orient="row").write_parquet(path)


def users_of(out: str | Path, manifest: Manifest, original: bool = True) -> list[list[tuple]]:
    """Shard by shard, one user after the other: its id, items (by their own ids), times, weights and places."""
    names = [None, *read_vocabulary(str(out), manifest)["item_id"].to_pylist()]
    found: list[list[tuple]] = [[] for _ in range(manifest.num_shards)]
    for file in manifest.files:
        rows = read_shard(str(out), file).to_pylist()
        for row, places in zip(rows, read_index(str(out), file).to_pylist(), strict=True):
            items = [names[dense] for dense in row["item_ids"]] if original else row["item_ids"]
            found[file.shard].append((row["user_id"], items, row["timestamps"], row.get("weights"), places))
    return found


def vocabulary_of(out: str | Path, manifest: Manifest) -> list[tuple]:
    return [tuple(row.values()) for row in read_vocabulary(str(out), manifest).to_pylist()]


def digests(directory: str | Path) -> dict[str, str]:
    files = (path for path in sorted(Path(directory).rglob("*")) if path.is_file())
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def versions(parts: Sequence[Sequence[Row]], where: Path, types: dict[str, Any], **options: Any) -> list[Manifest]:
    """v0, v1, … below `where`, each appended to the one before; its raw rows are gone when the next is made."""
    made = []
    for number, rows in enumerate(parts):
        write(where / "raw" / "log.parquet", rows, types)
        parent = {"append_to": where / f"v{number - 1}"} if number else options
        made.append(
            prepare(PrepareConfig.model_validate({**parent, "source": where / "raw", "out": where / f"v{number}"}))
        )
        shutil.rmtree(where / "raw")
    return made


def whole(parts: Sequence[Sequence[Row]], where: Path, types: dict[str, Any], **options: Any) -> Manifest:
    """The same rows prepared at once into `where`/whole."""
    for number, rows in enumerate(parts):
        write(where / "all" / f"{number}.parquet", rows, types)
    return prepare(PrepareConfig.model_validate({**options, "source": where / "all", "out": where / "whole"}))


def few(check: Callable[..., None]) -> Callable[..., None]:
    return settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])(check)


def many(check: Callable[..., None]) -> Callable[..., None]:
    more = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])(check)
    return pytest.mark.exhaustive(more)


ids = st.integers(-2, 6)
names = st.sampled_from(["", "a", "b", "ab", "é", "7", "007", "日本"])
INT_TYPES = {"user_id": pl.Int64, "item_id": pl.Int64, "timestamp": pl.Int64}
TEXT_TYPES = {"user_id": pl.String, "item_id": pl.String, "timestamp": pl.Int64}


def logs(of: st.SearchStrategy) -> st.SearchStrategy:
    return st.lists(st.tuples(of, of, st.integers(0, 9), st.sampled_from([*EVENTS, "other"])), min_size=3, max_size=40)


splits = st.sampled_from(["leave_one_out", "time:4,7", "users:0.3,0.4"])


def check_equal_to_the_whole(
    log: Any, cuts: list[int], late: bool, duplicates: str, split: str, vocabulary: dict[str, Any], weighted: bool,
    max_history: int | None, timed: bool, seed: int,
):  # fmt: skip
    rows, types = log
    # What the module says cannot be equal:
    late = late and duplicates != "consecutive"
    if duplicates != "none":
        vocabulary = {name: value for name, value in vocabulary.items() if name != "hash_buckets"}
    if duplicates == "exact":
        timed, max_history = True, None
    bounds = [-1, *sorted(cuts), 10]
    draw = random.Random(seed)
    part_of = [draw.randrange(len(bounds) - 1) if late else sum(row[2] >= cut for cut in bounds[1:]) for row in rows]
    if not timed:
        part_of = sorted(part_of)
    parts = [
        [row for row, part in zip(rows, part_of, strict=True) if part == number] for number in range(len(bounds) - 1)
    ]
    parts = [part for part in parts if part and (not weighted or any(row[3] in EVENTS for row in part))]
    if len(parts) < 2:
        return
    options = {
        "min_user_interactions": 1, "min_item_interactions": 1, "num_shards": 3, "duplicates": duplicates,
        "split": split if timed else "leave_one_out", "max_history": max_history, **vocabulary,
        **({"event_column": "event", "event_weights": EVENTS} if weighted else {}),
        **({} if timed else {"time_column": None}),
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as directory:
        where = Path(directory)
        made, at_once = versions(parts, where, types, **options)[-1], whole(parts, where, types, **options)
        out = where / f"v{len(parts) - 1}"
        verify(str(out), made)
        hashed = "hash_buckets" in vocabulary
        assert users_of(out, made, not hashed) == users_of(where / "whole", at_once, not hashed)
        assert (made.num_users, made.num_interactions) == (at_once.num_users, at_once.num_interactions)
        ours, theirs = vocabulary_of(out, made), vocabulary_of(where / "whole", at_once)
        if hashed:
            assert ours == theirs
            assert digests(out)["vocabulary/buckets.parquet"] == digests(where / "whole")["vocabulary/buckets.parquet"]
        else:
            assert {row[0]: row[2:] for row in ours} == {row[0]: row[2:] for row in theirs}
            assert [row[1] for row in ours] == list(range(1, len(theirs) + 1))
        assert made.parent == manifest_hash(str(where / f"v{len(parts) - 2}"))
        event(f"{len(parts)} versions")


WHOLE = given(
    log=st.one_of(st.tuples(logs(ids), st.just(INT_TYPES)), st.tuples(logs(names), st.just(TEXT_TYPES))),
    cuts=st.lists(st.integers(1, 9), min_size=1, max_size=2, unique=True),
    late=st.booleans(),
    duplicates=st.sampled_from(["none", "exact", "consecutive"]),
    split=splits,
    vocabulary=st.sampled_from([{}, {"out_of_vocabulary": "bucket"}, {"hash_buckets": 3}, {"hash_buckets": 50}]),
    weighted=st.booleans(),
    max_history=st.sampled_from([None, 1, 2, 5]),
    timed=st.booleans(),
    seed=st.integers(0, 99),
)
test_equals_preparing_everything_at_once = few(WHOLE(check_equal_to_the_whole))
test_equals_preparing_everything_at_once_often = many(WHOLE(check_equal_to_the_whole))


def core(rows: list[Row], min_user: int, min_item: int) -> list[Row]:
    while True:
        users, items = Counter(row[0] for row in rows), Counter(row[1] for row in rows)
        kept = [row for row in rows if users[row[0]] >= min_user and items[row[1]] >= min_item]
        if kept == rows:
            return rows
        rows = kept


def flat(users: list[list[tuple]]) -> Counter:
    return Counter(
        (user, item, time)
        for shard in users
        for user, items, times, *_ in shard
        for item, time in zip(items, times, strict=True)
    )


def check_admission(old: list[Row], new: list[Row], min_user: int, min_item: int):
    first = core(old, min_user, min_item)
    if not first:
        return
    expected = core(first + new, min_user, min_item)
    assert not Counter(first) - Counter(expected)  # a core stays one
    options = {"min_user_interactions": min_user, "min_item_interactions": min_item, "num_shards": 2}
    with tempfile.TemporaryDirectory() as directory:
        where = Path(directory)
        before, made = versions([old, new], where, INT_TYPES, **options)
        assert flat(users_of(where / "v1", made)) == Counter(row[:3] for row in expected)
        old_vocabulary = vocabulary_of(where / "v0", before)
        assert [row[:2] for row in vocabulary_of(where / "v1", made)][: len(old_vocabulary)] == [
            row[:2] for row in old_vocabulary
        ]

        def seen(rows: list[Row], place: int) -> set:
            return {row[place] for row in rows}

        lost = seen(new, 1) - seen(expected, 1)
        assert made.drift == {
            "new_users": len(seen(expected, 0) - seen(first, 0)),
            "new_items": len(seen(expected, 1) - seen(first, 1)),
            "rejected_users": len(seen(new, 0) - seen(expected, 0)),
            "rejected_items": len(lost),
            "rows_of_rejected_items": sum(row[1] in lost for row in new),
            "rejected_rows": len(first) + len(new) - len(expected),
            "rejected_rows_before": len(old) - len(first),
        }
        everything = core(old + new, min_user, min_item)
        assert not Counter(expected) - Counter(everything)
        most = made.num_interactions + made.drift["rejected_rows"] + made.drift["rejected_rows_before"]
        assert made.num_interactions <= len(everything) <= most


CORES = given(old=logs(ids), new=logs(ids), min_user=st.integers(1, 4), min_item=st.integers(1, 4))
test_admission_is_the_k_core_of_the_parent_and_the_new_rows = few(CORES(check_admission))
test_admission_is_the_k_core_of_the_parent_and_the_new_rows_often = many(CORES(check_admission))


def test_rare_items_of_each_version(options: Options, log: Log, tmp_path: Path):
    """An item below min_count shares an id; where it comes again, its new rows alone decide."""
    rare = {"min_count": 2, "out_of_vocabulary": "bucket"}
    first = log("a.parquet", user_id=[1] * 6, item_id=[10, 10, 11, 12, 12, 13], timestamp=[1, 2, 3, 4, 5, 6])
    second = log("b.parquet", user_id=[1] * 5, item_id=[11, 11, 13, 14, 10], timestamp=[7, 8, 9, 10, 11])
    prepare(options(first, out=tmp_path / "v1", **rare))
    made = prepare(PrepareConfig(source=second, out=str(tmp_path / "v2"), append_to=str(tmp_path / "v1")))
    assert made.out_of_vocabulary == 3
    assert vocabulary_of(tmp_path / "v2", made) == [(10, 1, 3, 2), (12, 2, 2, 2), (None, 3, 4, 3), (11, 4, 2, 2)]
    (row,) = (row for file in made.files for row in read_shard(str(tmp_path / "v2"), file).to_pylist())
    assert row["item_ids"] == [1, 1, 3, 2, 2, 3, 4, 4, 3, 3, 1]
    (places,) = (row for file in made.files for row in read_index(str(tmp_path / "v2"), file).to_pylist())
    assert places == {"length": 11, "train": 9, "valid": -1, "test": 10}  # the shared id is no target
    assert made.drift is not None
    assert {name: made.drift[name] for name in ("new_items", "rejected_items", "rejected_rows")} == {
        "new_items": 1, "rejected_items": 0, "rejected_rows": 0,
    }  # fmt: skip

    dropped = prepare(options(first, out=tmp_path / "w1", min_count=2))
    assert dropped.ledger[-1].dropped == {"below_min_count": 2}
    made = prepare(PrepareConfig(source=second, out=str(tmp_path / "w2"), append_to=str(tmp_path / "w1")))
    assert made.drift == {
        "new_users": 0, "new_items": 1, "rejected_users": 0, "rejected_items": 2, "rows_of_rejected_items": 2,
        "rejected_rows": 2, "rejected_rows_before": 2,
    }  # fmt: skip


def test_rows_that_are_there_already_change_nothing(options: Options, log: Log, tmp_path: Path):
    path = log(user_id=[1, 1, 2, 3], item_id=[7, 8, 7, 7], timestamp=[1, 2, 3, 4])
    first = prepare(options(path, out=tmp_path / "v1", duplicates="exact"))
    again = prepare(PrepareConfig(source=path, out=str(tmp_path / "v2"), append_to=str(tmp_path / "v1")))
    assert again.ledger[-1].model_dump() == {
        "stage": "write", "rows_in": 4, "rows_out": 4, "dropped": {"duplicate_of_parent": 4}, "added": 4
    }  # fmt: skip
    assert again.files == first.files
    assert again.vocabulary == first.vocabulary

    prepare(options(path, out=tmp_path / "w1"))
    twice = prepare(PrepareConfig(source=path, out=str(tmp_path / "w2"), append_to=str(tmp_path / "w1")))
    assert twice.num_interactions == 8  # without duplicates=exact nobody notices


def counts_of(out: Path, manifest: Manifest) -> tuple[list[int], dict[Any, int]]:
    """By dense id, and with buckets by item; the buckets' sums are the dense ids' counts."""
    counts = read_vocabulary(str(out), manifest)["count"].to_pylist()
    assert manifest.buckets is not None
    buckets = pl.read_parquet(out / manifest.buckets.path)
    sums = [0] * len(counts)
    for dense, count in buckets.select("dense_id", "count").iter_rows():
        assert count >= 0
        sums[dense - 1] += count
    assert sums == counts
    return counts, dict(buckets.select("item_id", "count").iter_rows())


def test_items_of_a_bucket_are_not_counted_again(options: Options, log: Log, tmp_path: Path):
    columns = {"user_id": [1, 1, 2, 2, 3, 3, 4, 4], "item_id": [7, 8, 7, 9, 7, 8, 7, 8], "timestamp": list(range(8))}
    path = log(**columns)
    first = prepare(options(path, out=tmp_path / "v1", duplicates="exact", hash_buckets=2))
    again = prepare(PrepareConfig(source=path, out=str(tmp_path / "v2"), append_to=str(tmp_path / "v1")))
    assert (again.vocabulary, again.buckets) == (first.vocabulary, first.buckets)
    assert counts_of(tmp_path / "v2", again)[1] == {7: 4, 8: 3, 9: 1}

    # Of an item's new rows, those that repeat decide which one names the bucket: 9 has three of its own.
    more = log("more.parquet", user_id=[1, 2, 5, 6, 7, 8], item_id=[7, 7, 9, 9, 9, 9], timestamp=[0, 2, 5, 6, 7, 8])
    one = prepare(options(path, out=tmp_path / "w1", duplicates="exact", hash_buckets=1))
    made = prepare(PrepareConfig(source=more, out=str(tmp_path / "w2"), append_to=str(tmp_path / "w1")))
    assert vocabulary_of(tmp_path / "w1", one)[0][:3] == (7, 1, 8)
    assert vocabulary_of(tmp_path / "w2", made)[0][:3] == (9, 1, 12)
    assert counts_of(tmp_path / "w2", made) == ([12], {9: 5, 7: 4, 8: 3})


def test_of_a_bucket_the_most_frequent_items_lose_old_rows():
    catalogue = pl.Series("item_id", [7, 8, 9])
    config = PrepareConfig.model_validate({"source": "-", "out": "-", "hash_buckets": 1})
    words = vocabulary.build(catalogue, np.array([5, 3, 4]), config)
    left = words.without(catalogue, Tally.of(np.array([0, 0, 2])), Tally(np.array([1]), np.array([4])))
    assert left.table.rows() == [(9, 1, 5)]
    assert left.buckets is not None
    assert left.buckets.rows() == [(9, 1, 3), (8, 1, 2), (7, 1, 0)]


def check_counts_of_buckets(
    log: list[Row], cut: int, duplicates: str, buckets: int, max_history: int | None, late: bool
):
    """Some rows are in both versions; late: the new ones' times are before and after the old ones'."""
    log = log if late else sorted(log, key=lambda row: row[2])
    cut = min(cut, len(log))
    parts = [log[:cut], log[cut // 2 :]]
    options = {
        "min_user_interactions": 1, "min_item_interactions": 1, "num_shards": 2, "duplicates": duplicates,
        "hash_buckets": buckets, "max_history": max_history,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as directory:
        made = versions(parts, Path(directory), INT_TYPES, **options)
        beyond = sum(one.ledger[-1].dropped.get("beyond_max_history", 0) for one in made)
        counts, of_item = counts_of(Path(directory) / "v1", made[1])
        assert sum(counts) == made[1].num_interactions + beyond
        if duplicates == "exact" and max_history is None and buckets > 1000:
            assert of_item == Counter(item for _, item, _ in {row[:3] for row in log})


BUCKETS = given(
    log=logs(ids),
    cut=st.integers(1, 30),
    duplicates=st.sampled_from(["exact", "consecutive", "none"]),
    buckets=st.sampled_from([1, 3, 1 << 16]),
    max_history=st.sampled_from([None, 2]),
    late=st.booleans(),
)
test_counts_of_buckets = few(BUCKETS(check_counts_of_buckets))
test_counts_of_buckets_often = many(BUCKETS(check_counts_of_buckets))


def test_of_one_time_the_old_rows_come_first(options: Options, log: Log, tmp_path: Path):
    first = log("a.parquet", user_id=[1, 1, 2], item_id=[9, 8, 8], timestamp=[5, 5, 4])
    second = log("b.parquet", user_id=[2, 1, 1, 1], item_id=[5, 7, 6, 1], timestamp=[4, 5, 5, 4])
    prepare(options(first, out=tmp_path / "v1"))
    made = prepare(PrepareConfig(source=second, out=str(tmp_path / "v2"), append_to=str(tmp_path / "v1")))
    found = {user: items for shard in users_of(tmp_path / "v2", made) for user, items, *_ in shard}
    assert found == {1: [1, 9, 8, 7, 6], 2: [8, 5]}


def test_without_times_new_rows_follow(options: Options, log: Log, tmp_path: Path):
    """The first of user 1 repeats the last old one; places go on without a gap."""
    first = log("a.csv", user_id=[1, 2, 1], item_id=[9, 9, 8])
    second = log("b.csv", user_id=[1, 1, 2, 1, 1], item_id=[8, 8, 7, 7, 8])
    prepare(options(first, out=tmp_path / "v1", time_column=None, duplicates="consecutive"))
    made = prepare(PrepareConfig(source=second, out=str(tmp_path / "v2"), append_to=str(tmp_path / "v1")))
    found = {user: (items, times) for shard in users_of(tmp_path / "v2", made) for user, items, times, *_ in shard}
    assert found == {1: ([9, 8, 7, 8], [0, 1, 2, 3]), 2: ([9, 7], [0, 1])}


def test_late_rows_and_consecutive_duplicates(options: Options, log: Log, tmp_path: Path):
    first = log("a.parquet", user_id=[1, 1, 2], item_id=[7, 7, 8], timestamp=[1, 5, 5])
    late = log("b.parquet", user_id=[1, 2], item_id=[8, 8], timestamp=[3, 3])
    prepare(options(first, out=tmp_path / "v1", duplicates="consecutive"))
    made = prepare(PrepareConfig(source=late, out=str(tmp_path / "v2"), append_to=str(tmp_path / "v1")))
    found = {user: (items, times) for shard in users_of(tmp_path / "v2", made) for user, items, times, *_ in shard}
    # At once, user 1 would have 7, 8, 7. User 2: the later of two, though it is the old one.
    assert found == {1: ([7, 8], [1, 3]), 2: ([8], [3])}


def test_old_rows_are_no_duplicates_of_each_other(options: Options, log: Log, tmp_path: Path):
    """Two items of one bucket, and equal items between which a row was dropped."""
    same = log("a.parquet", user_id=[1, 1], item_id=[7, 8], timestamp=[5, 5])
    new = log("b.parquet", user_id=[1], item_id=[9], timestamp=[6])
    prepare(options(same, out=tmp_path / "v1", duplicates="exact", hash_buckets=1))
    made = prepare(PrepareConfig(source=new, out=str(tmp_path / "v2"), append_to=str(tmp_path / "v1")))
    assert made.num_interactions == 3

    between = log("c.parquet", user_id=[1, 1, 1, 2], item_id=[7, 8, 7, 7], timestamp=[1, 2, 3, 3])
    core = {"min_item_interactions": 2, "duplicates": "consecutive"}
    assert prepare(options(between, out=tmp_path / "w1", **core)).num_interactions == 3
    more = log("d.parquet", user_id=[1, 2], item_id=[9, 9], timestamp=[6, 6])
    made = prepare(PrepareConfig(source=more, out=str(tmp_path / "w2"), append_to=str(tmp_path / "w1")))
    assert made.num_interactions == 5


def many_users(log: Log, name: str, users: Sequence[int]) -> str:
    return log(
        name, user_id=list(users), item_id=[user % 5 for user in users], timestamp=[100 + user for user in users]
    )


def test_untouched_shards_are_copied_by_their_bytes_and_not_read(options: Options, log: Log, tmp_path: Path):
    first = prepare(options(many_users(log, "a.parquet", range(200)), out=tmp_path / "v1", num_shards=8))
    files = {file.shard: file for file in first.files}
    shard = next(number for number, file in files.items() if 0 in users_in(tmp_path / "v1", file))
    other = next(file for file in first.files[1:] if file.shard != shard)  # of the first, the footer tells the types
    path = tmp_path / "v1" / other.path
    path.write_bytes(b"x" * path.stat().st_size)  # not to be read, or this would be noticed
    before = digests(tmp_path / "v1")

    new = many_users(log, "b.parquet", [0])
    made = prepare(PrepareConfig(source=new, out=str(tmp_path / "v2"), append_to=str(tmp_path / "v1")))
    assert digests(tmp_path / "v1") == before
    after = digests(tmp_path / "v2")
    changed = {name for name in before if name.startswith(("shards", "index")) and before[name] != after[name]}
    assert changed == {files[shard].path, files[shard].index.path}
    assert [file for file in made.files if file.shard != shard] == [file for file in first.files if file.shard != shard]
    assert made.num_interactions == 201
    with pytest.raises(GenattError, match=f"{other.path} is damaged"):
        verify(str(tmp_path / "v2"), made)


def users_in(out: Path, file: Any) -> list[Any]:
    return read_shard(str(out), file)["user_id"].to_pylist()


def test_nothing_admitted(options: Options, log: Log, tmp_path: Path):
    twice = {"min_user_interactions": 2, "min_item_interactions": 2}
    first = prepare(
        options(
            log("a.parquet", user_id=[1, 1, 5], item_id=[7, 7, 7], timestamp=[1, 2, 3]), out=tmp_path / "v1", **twice
        )
    )
    new = log("b.parquet", user_id=[3, 4], item_id=[9, 7], timestamp=[1, 2])
    made = prepare(PrepareConfig(source=new, out=str(tmp_path / "v2"), append_to=str(tmp_path / "v1")))
    assert (made.files, made.vocabulary) == (first.files, first.vocabulary)
    assert made.drift is not None
    assert (made.drift["rejected_users"], made.drift["rejected_items"], made.drift["rejected_rows"]) == (2, 1, 2)
    late = log("c.csv", user_id=[1], item_id=[7], timestamp=[1])
    made = prepare(
        PrepareConfig(source=late, out=str(tmp_path / "v3"), append_to=str(tmp_path / "v2"), time_from=0, time_to=1)
    )
    assert (made.files, made.ledger[0].dropped) == (first.files, {"outside_time_range": 1})
    assert made.drift is not None
    assert made.drift["rejected_rows_before"] == 3  # one of the first version, two of the second


def test_drift_in_words():
    assert drift_text({"new_users": 0, "new_items": 1200, "rejected_rows": 3}) == "1,200 new items, 3 rejected rows"
    assert drift_text({"new_users": 0}) == "nothing new"


def test_leave_one_out_targets_move_on(options: Options, log: Log, tmp_path: Path):
    prepare(options(log("a.parquet", user_id=[1] * 3, item_id=[5, 6, 7], timestamp=[1, 2, 3]), out=tmp_path / "v1"))
    new = log("b.parquet", user_id=[1], item_id=[8], timestamp=[4])
    made = prepare(PrepareConfig(source=new, out=str(tmp_path / "v2"), append_to=str(tmp_path / "v1")))
    (places,) = (row for file in made.files for row in read_index(str(tmp_path / "v2"), file).to_pylist())
    assert places == {"length": 4, "train": 2, "valid": 2, "test": 3}
    assert vocabulary_of(tmp_path / "v2", made) == [(5, 1, 1, 1), (6, 2, 1, 1), (7, 3, 1, 0), (8, 4, 1, 0)]


def test_attributes_of_both_versions(options: Options, log: Log, tmp_path: Path):
    def a_set(name: str, items: list[int], **attributes: list[Any]) -> Path:
        log(f"{name}/interactions.parquet", user_id=[1] * len(items), item_id=items, timestamp=[1] * len(items))
        pl.DataFrame({"item_id": [*items, 99], **attributes}, strict=False).write_parquet(
            tmp_path / name / "items.parquet"
        )
        return tmp_path / name

    first = a_set("a", [7, 8], title=["seven", "eight", None], tags=[["x"], ["y"], None], year=[1, 2, 3])
    prepare(options(first, out=tmp_path / "v1"))
    second = a_set("b", [8, 9], title=[None, "nine", None], tags=[["z", "z"], [], None], price=[0.5, None, 1.0])
    made = prepare(PrepareConfig(source=str(second), out=str(tmp_path / "v2"), append_to=str(tmp_path / "v1")))
    table = read_vocabulary(str(tmp_path / "v2"), made)
    assert table["item_id"].to_pylist() == [7, 8, 9]
    assert table["title"].to_pylist() == ["seven", "eight", "nine"]
    assert table["tags"].to_pylist() == [["x"], ["z", "z"], []]
    assert table["year"].to_pylist() == [1, 2, None]
    assert table["price"].to_pylist() == [None, 0.5, None]
    plain = log("c.parquet", user_id=[1], item_id=[10], timestamp=[3])
    made = prepare(PrepareConfig(source=plain, out=str(tmp_path / "v3"), append_to=str(tmp_path / "v2")))
    assert read_vocabulary(str(tmp_path / "v3"), made)["title"].to_pylist() == ["seven", "eight", "nine", None]

    third = a_set("d", [8], year=["two", None])
    assert "column 'year' of items.parquet has type" in refused(source=str(third), append_to=str(tmp_path / "v2"))


def test_ids_are_read_as_the_parent_has_them(options: Options, log: Log, tmp_path: Path):
    prepare(options(log("a.csv", user_id=[1, 2], item_id=["x1", "007"], timestamp=[1, 2]), out=tmp_path / "v1"))
    new = log("b.csv", user_id=[1, 2], item_id=["7", "12"], timestamp=[3, 4])
    made = prepare(PrepareConfig(source=new, out=str(tmp_path / "v2"), append_to=str(tmp_path / "v1")))
    assert read_vocabulary(str(tmp_path / "v2"), made)["item_id"].to_pylist() == ["007", "x1", "12", "7"]


def refused(**changes: Any) -> str:
    """The message of the error; nothing is left of what was begun."""
    with tempfile.TemporaryDirectory() as directory:
        config = PrepareConfig.model_validate({"out": f"{directory}/out", **changes})
        with pytest.raises(GenattError) as caught, without_ray():
            prepare_module.prepare(config, progress=False)
        if "out" not in changes:
            assert list(Path(directory).iterdir()) == []
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture
def parent(options: Options, log: Log, tmp_path: Path) -> Path:
    path = log("old.parquet", user_id=[1, 1, 2], item_id=[7, 8, 7], timestamp=[1_700_000_000 + i for i in range(3)])
    prepare(options(path, out=tmp_path / "parent", split="time:2024-01-01,2024-02-01", min_item_interactions=1))
    return tmp_path / "parent"


@pytest.fixture
def new(log: Log) -> str:
    return log("new.parquet", user_id=[1, 3], item_id=[8, 9], timestamp=[1_710_000_000, 1_710_000_001])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_shards": 3}, "num_shards=3 but .*/parent was prepared with num_shards=2"),
        ({"duplicates": "exact"}, "duplicates=exact but .* prepared with duplicates=none"),
        ({"max_history": 5}, "max_history=5 but .* prepared with max_history=None"),
        ({"split": "leave_one_out"}, r"split=\{'rule': 'leave_one_out'.* but"),
        ({"split": "time:2024-01-01,2024-03-01"}, "split=.* but"),
        ({"event_column": "event", "event_weights": {"a": 1.0}}, "event_weights=.* but .* event_weights=None"),
        ({"seed": 1}, "seed=1 but"),
        ({"hash_buckets": 9}, "hash_buckets=9 but"),
        ({"id_type": "string"}, "user ids are text in the new rows but integers in .*parent"),
        ({"time_unit": "ms"}, "the new rows have times in ms but .*parent has times in s"),
        ({"time_column": None}, "the new rows have no time column but"),
    ],
)
def test_contradicting_the_parent(parent: Path, new: str, changes: dict[str, Any], said: str):
    message = refused(source=new, append_to=str(parent), **changes)
    assert re.match(said, message), message


def test_agreeing_with_the_parent(parent: Path, new: str, tmp_path: Path):
    """Said again, an option is no contradiction; dates of a split neither."""
    same = {"num_shards": 2, "min_user_interactions": 1, "split": "time:2024-01-01,2024-02-01"}
    config = PrepareConfig.model_validate({"source": new, "out": tmp_path / "v2", "append_to": parent, **same})
    made = prepare(config)
    assert made.split == load_manifest(str(parent)).split
    assert made.name == "old"


def test_other_kinds_of_rows(parent: Path, log: Log):
    milliseconds = log("ms.parquet", user_id=[1], item_id=[7], timestamp=[1_700_000_000_000])
    assert "the new rows have times in ms but" in refused(source=milliseconds, append_to=str(parent))
    text = log("text.parquet", user_id=[1], item_id=["x"], timestamp=[1_700_000_000])
    assert refused(source=text, append_to=str(parent)).startswith("item ids are text in the new rows but integers in")


def test_damaged_parents(parent: Path, new: str, tmp_path: Path):
    def broken(change: Callable[[Path], None]) -> str:
        copy = tmp_path / "copy"
        shutil.copytree(parent, copy)
        change(copy)
        try:
            return refused(source=new, append_to=str(copy))
        finally:
            shutil.rmtree(copy)

    def flip(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 255
        path.write_bytes(content)

    manifest = load_manifest(str(parent))
    shard = next(file.path for file in manifest.files if 1 in users_in(parent, file))

    def other_version(copy: Path) -> None:
        told = json.loads((copy / "manifest.json").read_text())
        (copy / "manifest.json").write_text(json.dumps(told | {"schema_version": 1}))

    assert f"{shard} is missing" in broken(lambda copy: (copy / shard).unlink())
    assert f"{shard} is damaged: 3 bytes instead of" in broken(lambda copy: (copy / shard).write_bytes(b"PAR"))
    assert shard in broken(lambda copy: flip(copy / shard))
    assert "items.parquet is damaged" in broken(lambda copy: flip(copy / "vocabulary" / "items.parquet"))
    assert "is no prepared data set" in broken(lambda copy: (copy / "manifest.json").unlink())
    assert "manifest.json is damaged" in broken(lambda copy: (copy / "manifest.json").write_text("{"))
    assert "schema version 1, this program reads 2" in broken(other_version)


def test_appending_to_itself(parent: Path, new: str):
    before = digests(parent)
    assert refused(source=new, append_to=str(parent), out=str(parent)).startswith(f"output {parent} exists already")
    assert digests(parent) == before


def test_what_tasks_get_of_the_parent_is_small(parent: Path):
    """Not the manifest, which grows with the shards."""
    old = Parent.load(str(parent)).files
    assert {type(shard).__name__ for shard in old.values()} == {"OldShard"}
    assert all(set(vars(shard)) == {"path", "file"} for shard in old.values())


@pytest.mark.ray
def test_on_ray(options: Options, log: Log, tmp_path: Path, local_cluster: None):
    """As in process: the same bytes. An error in a task is one line."""
    old, new = many_users(log, "a.parquet", range(300)), many_users(log, "b.parquet", range(250, 400, 3))
    first = options(old, out=tmp_path / "v1", num_shards=4, min_user_interactions=1)
    second = PrepareConfig(source=new, out=str(tmp_path / "v2"), append_to=str(tmp_path / "v1"))
    prepare(first)
    prepare_module.prepare(second, progress=False)
    prepare(second.model_copy(update={"out": str(tmp_path / "v3")}))
    assert digests(tmp_path / "v2") == digests(tmp_path / "v3")
    verify(str(tmp_path / "v2"), load_manifest(str(tmp_path / "v2")))

    file = load_manifest(str(tmp_path / "v1")).files[0]
    path = tmp_path / "v1" / file.path
    content = bytearray(path.read_bytes())
    content[10:60] = bytes(50)
    path.write_bytes(content)
    with pytest.raises(GenattError, match=file.path) as caught:
        prepare_module.prepare(second.model_copy(update={"out": str(tmp_path / "v4")}), progress=False)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "v4").exists()
