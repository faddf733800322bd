"""The whole preparation on a local Ray."""

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

from data_pipeline import prepare as prepare_module
from data_pipeline.config import PrepareConfig
from data_pipeline.errors import GenattError
from data_pipeline.format import Manifest, load_manifest, read_shard, read_vocabulary, verify
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


@pytest.mark.parametrize("duplicates", ["none", "exact", "consecutive"])
def test_equals_the_plain_reference(
    duplicates: str, rows: list[Row], days: Path, options: Options, local_cluster: None
):
    config = options(
        days, duplicates=duplicates, min_user_interactions=8, min_item_interactions=12, num_shards=3, rows_per_block=40
    )
    manifest = prepare(config, progress=False)
    expected = prepare_slowly(rows, duplicates, 8, 12)
    assert 0 < expected.dropped_by_core < 300

    assert load_manifest(config.out) == manifest
    verify(config.out, manifest)
    assert sequences(config.out, manifest) == expected.sequences
    assert [tuple(row.values()) for row in read_vocabulary(config.out, manifest).to_pylist()] == expected.items
    assert manifest.num_users == len(expected.sequences)
    assert manifest.num_items == len(expected.items)
    assert [(entry.stage, entry.rows_in - entry.rows_out) for entry in manifest.ledger] == [
        ("read", 0),
        ("order", expected.dropped_duplicates),
        ("k-core", expected.dropped_by_core),
        ("write", 0),
    ]
    schema = read_shard(config.out, manifest.files[0]).schema
    assert [str(field.type) for field in schema] == ["int64", "list<element: int32>", "list<element: int64>"]


def test_same_bytes_whatever_the_workers_and_blocks(days: Path, options: Options, tmp_path: Path, local_cluster: None):
    one, other = (
        options(days, out=tmp_path / "one"),
        options(days, out=tmp_path / "other", num_cpus=1, rows_per_block=30),
    )
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
    assert [line.split()[0] for line in done.stderr.splitlines()[:4]] == [
        "read",
        "order",
        "k-core",
        "write",
    ]  # and no more
    assert str(tmp_path / "one") not in manifest.to_json().decode()


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
    monkeypatch.setattr(prepare_module, "_write_vocabulary", interrupted)  # the shards are written by now
    with pytest.raises(KeyboardInterrupt):
        prepare(options(path), progress=False)
    assert [file.name for file in tmp_path.iterdir()] == ["log.parquet"]


def test_ray_that_cannot_start(options: Options, log: Callable[..., str], monkeypatch: pytest.MonkeyPatch):
    def broken(**_: object) -> None:
        raise RuntimeError("no space\nleft")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", broken)
    monkeypatch.setattr(ray, "shutdown", lambda: None)  # the session's Ray is not this test's to end
    message = refusal(options(log(user_id=[1], item_id=[1], timestamp=[1])))
    assert message.startswith("Ray cannot start: no space left")
    assert "POLARS_MAX_THREADS" not in os.environ
