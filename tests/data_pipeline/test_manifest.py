"""The published directory: what is written reads back, and what is wrong with it is said plainly."""

import hashlib
import json
from pathlib import Path

import pyarrow as pa
import pytest
from pydantic import ValidationError

from data_pipeline.errors import GenattError
from data_pipeline.format import (
    INDEX_SCHEMA,
    LedgerEntry,
    Manifest,
    RawFile,
    ShardFile,
    WrittenFile,
    load_manifest,
    manifest_hash,
    parquet_bytes,
    read_index,
    read_shard,
    read_vocabulary,
    shard_schema,
    verify,
)
from data_pipeline.splits import LeaveOneOut
from data_pipeline.storage import publishing, write_bytes


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


SHARD = pa.table({"user_id": [7], "item_ids": [[1, 1]], "timestamps": [[5, 6]]}, schema=shard_schema(pa.int64()))
INDEX = pa.table({"length": [2], "train": [2], "valid": [-1], "test": [-1]}, schema=INDEX_SCHEMA)
ITEMS = pa.table({"item_id": [3], "dense_id": pa.array([1], pa.int32()), "count": [2], "train_count": [2]})


def manifest() -> Manifest:
    shard, index, items = (parquet_bytes(table, 10) for table in (SHARD, INDEX, ITEMS))
    path, vocabulary = "shards/part-00000.parquet", "vocabulary/items.parquet"
    places = WrittenFile(path="index/part-00000.parquet", bytes=len(index), sha256=sha256(index))
    whole = {"path": path, "bytes": len(shard), "sha256": sha256(shard)}
    return Manifest(
        name="small",
        num_users=1,
        num_items=1,
        num_interactions=2,
        num_shards=1,
        row_group_size=10,
        split=LeaveOneOut(),
        files=(ShardFile(**whole, shard=0, users=1, interactions=2, index=places),),
        vocabulary=WrittenFile(path=vocabulary, bytes=len(items), sha256=sha256(items)),
        source=(RawFile(path="log.csv", bytes=9),),
        config={},
        config_hash="",
        ledger=(LedgerEntry(stage="read", rows_in=2, rows_out=2),),
    )


@pytest.fixture
def published(tmp_path: Path) -> str:
    with publishing(str(tmp_path / "out")) as directory:
        write_bytes(f"{directory}/shards/part-00000.parquet", parquet_bytes(SHARD, 10))
        write_bytes(f"{directory}/index/part-00000.parquet", parquet_bytes(INDEX, 10))
        write_bytes(f"{directory}/vocabulary/items.parquet", parquet_bytes(ITEMS, 10))
        write_bytes(f"{directory}/manifest.json", manifest().to_json())
    return str(tmp_path / "out")


def test_round_trip(published: str):
    loaded = load_manifest(published)
    assert loaded == manifest()
    verify(published, loaded)
    assert read_shard(published, loaded.files[0]).equals(SHARD)
    assert read_index(published, loaded.files[0]).equals(INDEX)
    assert read_vocabulary(published, loaded).equals(ITEMS)
    assert read_vocabulary(published, loaded, ["count"]).equals(ITEMS.select(["count"]))
    assert manifest_hash(published) == sha256(manifest().to_json())


def test_round_trip_in_a_remote_store(tmp_path: Path):
    with publishing("memory://bucket/out") as directory:
        write_bytes(f"{directory}/shards/part-00000.parquet", parquet_bytes(SHARD, 10))
        write_bytes(f"{directory}/index/part-00000.parquet", parquet_bytes(INDEX, 10))
        write_bytes(f"{directory}/vocabulary/items.parquet", parquet_bytes(ITEMS, 10))
        write_bytes(f"{directory}/manifest.json", manifest().to_json())
    verify("memory://bucket/out", load_manifest("memory://bucket/out"))
    with pytest.raises(GenattError, match="exists already"), publishing("memory://bucket/out"):
        pass


@pytest.mark.parametrize("out", ["memory://bucket/failed", "{tmp_path}/failed"])
def test_nothing_is_left_of_a_failure(out: str, tmp_path: Path):
    out = out.format(tmp_path=tmp_path)

    def fail() -> None:
        with publishing(out) as directory:
            write_bytes(f"{directory}/shards/part-00000.parquet", b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    with pytest.raises(GenattError, match="no prepared data set"):
        load_manifest(out)
    assert list(tmp_path.iterdir()) == []


def test_no_manifest(tmp_path: Path):
    with pytest.raises(GenattError, match=r"no prepared data set \(no manifest\.json there\): run `genatt prepare`"):
        load_manifest(str(tmp_path))


def test_unknown_schema_version(published: str):
    path = Path(published) / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema_version": 1}))
    with pytest.raises(GenattError, match="schema version 1, this program reads 2"):
        load_manifest(published)


@pytest.mark.parametrize("content", ["{", "[]", '{"schema_version": 2}'])
def test_damaged_manifest(content: str, published: str):
    (Path(published) / "manifest.json").write_text(content)
    with pytest.raises(GenattError, match=r"manifest\.json is damaged") as caught:
        load_manifest(published)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["shards/part-00000.parquet", "index/part-00000.parquet", "vocabulary/items.parquet"])
def test_verify_names_a_changed_and_a_missing_file(name: str, published: str):
    path = Path(published) / name
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(GenattError, match=f"{name} is damaged: expected sha256 .* found .* prepare it again"):
        verify(published, load_manifest(published))
    path.unlink()
    with pytest.raises(GenattError, match=f"{name} is missing"):
        verify(published, load_manifest(published))


def test_unreadable_shard(published: str):
    (Path(published) / "shards/part-00000.parquet").write_bytes(b"x")
    with pytest.raises(GenattError, match=r"cannot read .*part-00000\.parquet"):
        read_shard(published, manifest().files[0])


def test_sums_must_agree():
    with pytest.raises(ValidationError, match="stage read"):
        LedgerEntry(stage="read", rows_in=3, rows_out=1, dropped={"short": 1})
    fields = manifest().model_dump()
    for wrong in ({"num_users": 2}, {"num_interactions": 3}, {"ledger": [{"stage": "r", "rows_in": 1, "rows_out": 1}]}):
        with pytest.raises(ValidationError, match="totals"):
            Manifest.model_validate(fields | wrong)
    steps = [{"stage": "a", "rows_in": 3, "rows_out": 3}, {"stage": "b", "rows_in": 2, "rows_out": 2}]
    with pytest.raises(ValidationError, match="3 rows left a, 2 came to b"):
        Manifest.model_validate(fields | {"ledger": steps})


def test_existing_output_is_left_alone(tmp_path: Path):
    (tmp_path / "out").mkdir()
    with (
        pytest.raises(GenattError, match="out exists already: choose another --out"),
        publishing(str(tmp_path / "out")),
    ):
        pass
    assert (tmp_path / "out").is_dir()


def test_output_that_cannot_be_written(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(GenattError, match=r"cannot write .*file/out"), publishing(str(tmp_path / "file" / "out")):
        pass
