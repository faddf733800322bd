"""The whole preparation on a local Ray."""

import dataclasses
import hashlib
import os
import random
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pyarrow.parquet as pq
import pytest
import ray
from log_reference import Row, prepare_slowly

from data_pipeline import planning, ray_head
from data_pipeline import prepare as prepare_module
from data_pipeline.config import PrepareConfig
from data_pipeline.errors import GenattError
from data_pipeline.format import Manifest, load_manifest, read_index, read_shard, read_vocabulary, verify
from data_pipeline.local_ray import numbered, outputs
from data_pipeline.prepare import prepare

pytestmark = pytest.mark.ray
Options = Callable[..., PrepareConfig]


@pytest.fixture
def rows() -> list[Row]:
    """A log with repeats and many ties of time."""
    draw = random.Random(0)
    return [(draw.randint(1, 30), f"item {draw.randint(1, 20)}", draw.randint(0, 40)) for _ in range(400)]


@pytest.fixture
def days(rows: list[Row], tmp_path: Path) -> Path:
    """The log in three files: Parquet of several row groups, CSV, Parquet."""
    directory = tmp_path / "days"
    directory.mkdir()
    frame = pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp"], orient="row")
    frame[:150].write_parquet(directory / "a.parquet", row_group_size=40)
    frame[150:250].write_csv(directory / "b.csv")
    frame[250:].write_parquet(directory / "c.parquet")
    return directory


def sequences(out: str, manifest: Manifest) -> dict:
    tables = [read_shard(out, file) for file in manifest.files]
    return {row["user_id"]: (row["item_ids"], row["timestamps"]) for table in tables for row in table.to_pylist()}


def digests(directory: Path) -> dict[str, str]:
    files = (path for path in sorted(directory.rglob("*")) if path.is_file())
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def refusal(config: PrepareConfig) -> str:
    """The message of the error; nothing must be left, neither at `out` nor beside it."""
    beside = set(Path(config.out).parent.iterdir())
    with pytest.raises(GenattError) as caught:
        prepare(config, progress=False)
    assert type(caught.value) is GenattError
    assert set(Path(config.out).parent.iterdir()) == beside
    message = str(caught.value)
    assert "\n" not in message
    assert "Traceback" not in message
    return message


@pytest.mark.parametrize(
    "changes",
    [
        {"duplicates": "none", "min_user_interactions": 8, "min_item_interactions": 12},
        {"duplicates": "exact", "min_user_interactions": 8, "min_item_interactions": 12, "max_history": 5},
        {"duplicates": "consecutive", "min_count": 22, "out_of_vocabulary": "bucket"},
        {"min_count": 22, "max_history": 9},
    ],
)
def test_equals_the_plain_reference(changes: dict, rows: list[Row], days: Path, options: Options, local_cluster: None):
    config = options(days, num_shards=3, rows_per_block=40, **changes)
    manifest = prepare(config, progress=False)
    expected = prepare_slowly(rows, config)
    assert 0 < sum(expected.dropped.values()) < 350

    assert load_manifest(config.out) == manifest
    verify(config.out, manifest)
    assert sequences(config.out, manifest) == expected.sequences
    assert [tuple(row.values()) for row in read_vocabulary(config.out, manifest).to_pylist()] == expected.items
    assert manifest.num_users == len(expected.sequences)
    assert manifest.num_items == len(expected.items)
    shared = config.out_of_vocabulary == "bucket"
    assert manifest.out_of_vocabulary == (len(expected.items) if shared else None)
    ledger = {entry.stage: entry for entry in manifest.ledger}
    assert list(ledger) == ["read", "order", "k-core", "write"]
    dropped = {stage: sum(entry.dropped.values()) for stage, entry in ledger.items()}
    assert dropped == {
        "read": 0,
        "order": expected.dropped["duplicates"],
        "k-core": expected.dropped["core"],
        "write": expected.dropped["below_min_count"] + expected.dropped["beyond_max_history"],
    }
    shard = read_shard(config.out, manifest.files[0])
    assert [str(field.type) for field in shard.schema] == ["int64", "list<element: int32>", "list<element: int64>"]
    index = read_index(config.out, manifest.files[0])
    ids = shard["item_ids"].to_pylist()
    held_out = [2 * (len(items) >= 3) for items in ids]
    assert index["length"].to_pylist() == [len(items) for items in ids]
    assert index["train"].to_pylist() == [len(items) - out for items, out in zip(ids, held_out, strict=True)]
    rare = manifest.out_of_vocabulary  # is nobody's target
    targets = [len(items) - 1 if out and items[-1] != rare else -1 for items, out in zip(ids, held_out, strict=True)]
    assert index["test"].to_pylist() == targets


@pytest.mark.parametrize(
    ("rows_per_block", "slice_bytes"), [(30, 1), (77, 3000), (1_000_000, prepare_module.SLICE_BYTES)]
)
def test_same_bytes_whatever_the_blocks(
    rows_per_block: int, slice_bytes: int, days: Path, options: Options, tmp_path: Path, local_cluster: None,
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    prepare(options(days, out=tmp_path / "one"), progress=False)
    monkeypatch.setattr(prepare_module, "SLICE_BYTES", slice_bytes)
    prepare(options(days, out=tmp_path / "other", rows_per_block=rows_per_block), progress=False)
    assert digests(tmp_path / "one") == digests(tmp_path / "other")


@pytest.mark.slow
@pytest.mark.parametrize("workers", [*(pytest.param(count, marks=pytest.mark.exhaustive) for count in (1, 2)), 4])
def test_same_bytes_whatever_the_workers(
    workers: int, days: Path, options: Options, tmp_path: Path, local_cluster: None
):
    one, other = options(days, out=tmp_path / "one"), options(days, out=tmp_path / "other", num_cpus=workers)
    manifest = prepare(one, progress=False)
    script = "import sys; from data_pipeline.prepare import *; prepare(PrepareConfig.model_validate_json(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", script, other.model_dump_json()],
        env=os.environ | {"PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert digests(tmp_path / "one") == digests(tmp_path / "other")
    assert done.stdout == ""
    stages = [line.split()[0] for line in done.stderr.splitlines() if " rows/s" in line][:5]
    assert stages == ["read", "order", "encode", "k-core", "write"]  # one line each
    assert str(tmp_path / "one") not in manifest.to_json().decode()


def test_weights_ranges_and_splits(options: Options, log: Callable[..., str], local_cluster: None):
    path = log(
        user_id=[1, 1, 1, 1, 1, 2, 2],
        item_id=[10, 20, 30, 40, 50, 10, 60],
        timestamp=[100, 101, 102, 103, 104, 101, 103],
        event=["view", "cart", "seen", "cart", "view", "cart", "cart"],
    )
    config = options(
        path,
        event_column="event",
        event_weights={"view": 1, "cart": 3},
        time_to=104,
        split="time:102,103",
        num_shards=1,
    )
    manifest = prepare(config, progress=False)
    table, index = read_shard(config.out, manifest.files[0]), read_index(config.out, manifest.files[0])
    rows = {row["user_id"]: row["weights"] for row in table.to_pylist()}
    assert rows == {1: [1, 3, 3], 2: [3, 3]}
    places = dict(zip(table["user_id"].to_pylist(), index.to_pylist(), strict=True))
    assert places[1] == {"length": 3, "train": 2, "valid": -1, "test": 2}
    assert places[2] == {"length": 2, "train": 1, "valid": -1, "test": 1}
    assert manifest.ledger[0].dropped == {"outside_time_range": 1, "event_without_weight": 1}
    assert manifest.ledger[0].rows_in == 7


def test_hash_buckets(options: Options, log: Callable[..., str], local_cluster: None):
    path = log(user_id=[1, 1, 2], item_id=["a", "b", "a"], timestamp=[1, 2, 1])
    manifest = prepare(options(path, hash_buckets=50), progress=False)
    assert manifest.num_items == 50
    table = read_vocabulary(options(path).out, manifest)
    assert table["dense_id"].to_pylist() == list(range(1, 51))
    assert manifest.buckets is not None
    buckets = pl.read_parquet(f"{options(path).out}/{manifest.buckets.path}")
    dense = dict(zip(buckets["item_id"], buckets["dense_id"], strict=True))
    assert sequences(options(path).out, manifest) == {1: ([dense["a"], dense["b"]], [1, 2]), 2: ([dense["a"]], [1])}


def test_a_ledger_that_does_not_add_up_fails(
    options: Options, log: Callable[..., str], monkeypatch: pytest.MonkeyPatch, local_cluster: None
):
    def short(*arguments: object) -> tuple:
        counted, *slices = split(*arguments)
        return (counted, slices[0][:0], *slices[1:])  # rows of a shard get lost on the way

    split = prepare_module.tasks.split
    monkeypatch.setattr(prepare_module.tasks, "split", short)
    message = refusal(options(log(user_id=list(range(9)), item_id=[1] * 9, timestamp=[1] * 9)))
    assert message.startswith("the ledger does not add up: stage order: 9 rows in")


def test_a_source_that_changes_fails(
    options: Options, log: Callable[..., str], monkeypatch: pytest.MonkeyPatch, local_cluster: None
):
    def more(*arguments: object) -> object:
        planned = plan(*arguments)
        return dataclasses.replace(planned, rows=planned.rows + 1)

    plan = planning.plan
    monkeypatch.setattr(planning, "plan", more)
    message = refusal(options(log(user_id=[1, 2], item_id=[1, 1], timestamp=[1, 1])))
    assert "3 rows when it was looked at, 2 when it was read" in message


def test_ties_keep_the_order_of_rows(options: Options, log: Callable[..., str], local_cluster: None):
    log("days/a.parquet", user_id=[1, 1, 1], item_id=[50, 40, 30], timestamp=[9, 9, 9])
    path = Path(log("days/b.parquet", user_id=[1, 1], item_id=[20, 10], timestamp=[9, 8])).parent
    manifest = prepare(options(path), progress=False)
    originals = read_vocabulary(options(path).out, manifest)["item_id"].to_pylist()
    ids, times = sequences(options(path).out, manifest)[1]
    assert [originals[dense - 1] for dense in ids] == [10, 50, 40, 30, 20]
    assert times == [8, 9, 9, 9, 9]


def test_without_a_time_column_the_row_order_is_the_sequence(
    options: Options, log: Callable[..., str], local_cluster: None
):
    path = log(user_id=[1, 2, 1, 1], item_id=["a", "a", "b", "a"], timestamp=[3, 2, 1, 0])
    manifest = prepare(options(path, time_column=None), progress=False)
    assert sequences(options(path).out, manifest) == {1: ([1, 2, 1], [0, 1, 2]), 2: ([1], [0])}


def test_attributes_keep_their_types(options: Options, log: Callable[..., str], local_cluster: None):
    path = log("set/interactions.parquet", user_id=[1, 1], item_id=[7, 8], timestamp=[1, 2])
    log("set/items.parquet", item_id=[9, 8], title=["nine", "eight"], genres=[["x"], ["y", "z"]])
    manifest = prepare(options(Path(path).parent), progress=False)
    table = read_vocabulary(options(path).out, manifest)
    assert table["title"].to_pylist() == [None, "eight"]
    assert table["genres"].to_pylist() == [None, ["y", "z"]]

    twice = log("twice.csv", item_id=[8, 8], title=["one", "two"])
    assert "item 8 is listed more than once in twice.csv" in refusal(options(path, items=twice, out=f"{path}.out"))
    clash = log("clash.csv", item_id=[8], count=[1])
    assert "'count' of clash.csv" in refusal(options(path, items=clash, out=f"{path}.out"))
    text = log("text.csv", item_id=["x8"], title=["one"])
    assert "mixed types: int64 in the interactions" in refusal(options(path, items=text, out=f"{path}.out"))


def test_row_groups_are_bounded_and_users_shuffled(options: Options, tmp_path: Path, local_cluster: None):
    config = options("synthetic:users=300,items=50,rows=3000", num_shards=2, row_group_size=64)
    manifest = prepare(config, progress=False)
    groups = pl.read_parquet(f"{config.out}/{manifest.files[0].path}")
    assert not groups["user_id"].is_sorted()
    sizes = [pq.ParquetFile(f"{config.out}/{file.path}").metadata.row_group(0).num_rows for file in manifest.files]
    assert sizes == [64, 64]
    other = options("synthetic:users=300,items=50,rows=3000", num_shards=2, seed=1, out=tmp_path / "other")
    users = [sequences(made.out, load_manifest(made.out)) for made in (config, prepare(other, False) and other)]
    assert users[0] == users[1]
    assert list(users[0]) != list(users[1])


def test_shared_movielens(options: Options, shared_data: Path, local_cluster: None):
    manifest = prepare(options(shared_data / "ml-100k"), progress=False)
    assert (manifest.num_users, manifest.num_items, manifest.num_interactions) == (943, 1682, 100_000)
    log = pl.read_parquet(shared_data / "ml-100k" / "interactions.parquet")  # its row order is the sequence
    vocabulary = read_vocabulary(options("-").out, manifest)
    originals = pl.DataFrame({"item": vocabulary["dense_id"], "item_id": vocabulary["item_id"]})
    rows = pl.concat(pl.DataFrame(read_shard(options("-").out, file)) for file in manifest.files).sort("user_id")
    flat = rows.explode("item_ids", "timestamps").rename({"item_ids": "item"})
    assert flat.join(originals, on="item", maintain_order="left")["item_id"].to_list() == log["item_id"].to_list()
    assert flat["timestamps"].to_list() == log["timestamp"].to_list()


def test_error_inside_a_task_is_plain(options: Options, log: Callable[..., str], local_cluster: None):
    message = refusal(options(log(user_id=[1, 2], item_id=[1, None], timestamp=[1, 2])))
    assert message.startswith("column 'item_id' of log.parquet has 1 nulls")


def test_error_with_a_cause_that_cannot_be_pickled_is_plain(local_cluster: None):
    def fail(_: object) -> None:
        try:
            raise OSError(threading.Lock())
        except OSError as error:
            raise GenattError("cannot write out") from error

    with pytest.raises(GenattError, match=r"^cannot write out$"):
        list(outputs(numbered("n", 1).map_batches(fail), "write"))


def test_other_errors_of_a_task_name_the_stage(local_cluster: None):
    def fail(_: object) -> None:
        raise MemoryError("too large\nby far")

    with pytest.raises(
        GenattError, match=r"^stage write failed in Ray: MemoryError: too large by far: see Ray's own logs"
    ):
        list(outputs(numbered("n", 1).map_batches(fail), "write"))


def test_damage_behind_a_whole_footer_is_plain(options: Options, log: Callable[..., str], local_cluster: None):
    path = Path(log(user_id=list(range(5000)), item_id=list(range(5000)), timestamp=list(range(5000))))
    content = bytearray(path.read_bytes())
    content[40:400] = bytes(360)
    path.write_bytes(content)
    assert refusal(options(path)).startswith("log.parquet is no readable parquet file")


def test_nothing_left_after_the_k_core(options: Options, log: Callable[..., str], local_cluster: None):
    message = refusal(options(log(user_id=[1, 2], item_id=[1, 2], timestamp=[1, 2]), min_user_interactions=5))
    assert "no rows left of 2" in message
    assert "lower min_user_interactions" in message


def test_unwritable_output(options: Options, log: Callable[..., str]):
    path = log(user_id=[1], item_id=[1], timestamp=[1])
    with pytest.raises(GenattError, match="cannot write"):
        prepare(options(path, out=f"{path}/out"), progress=False)  # below a file: not even root can write there


def test_existing_output_is_an_error(options: Options, log: Callable[..., str], tmp_path: Path):
    (tmp_path / "out").mkdir()
    assert "exists already" in refusal(options(log(user_id=[1], item_id=[1], timestamp=[1])))


def test_interruption_leaves_nothing(
    options: Options, log: Callable[..., str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, local_cluster: None
):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    path = log(user_id=[1], item_id=[1], timestamp=[1])
    monkeypatch.setattr(prepare_module.vocabulary, "finish", interrupted)  # the shards are written by now
    with pytest.raises(KeyboardInterrupt):
        prepare(options(path), progress=False)
    assert [file.name for file in tmp_path.iterdir()] == ["log.parquet"]


def test_ray_that_cannot_start(options: Options, log: Callable[..., str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "shutdown", lambda: None)  # the session's Ray is not this test's to end
    monkeypatch.setattr(ray_head, "PROGRAM", (sys.executable, "-c", "raise RuntimeError('no space left')"))
    message = refusal(options(log(user_id=[1], item_id=[1], timestamp=[1])))
    assert message.startswith("Ray cannot start: RuntimeError: no space left")
    assert "POLARS_MAX_THREADS" not in os.environ
