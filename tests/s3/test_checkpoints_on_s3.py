"""Checkpoints on S3: complete or not there, read by ranges, cleaned up, and errors of one line in bounded time."""

from pathlib import Path

import pytest
import torch
from tiny_data import run_config, write_prepared

from data_pipeline.errors import GenattError
from genatt_dist import runs
from genatt_dist.embedding.table import TableShard
from genatt_dist.serving.trained import load
from genatt_dist.training.checkpoint import inventory, write
from genatt_dist.training.checkpoint.progress import Progress
from genatt_dist.training.checkpoint.store import Store
from genatt_dist.training.options import CheckpointConfig

pytestmark = pytest.mark.s3

ROWS = 5000
TABLE = torch.arange(ROWS * 64.0).view(ROWS, 64)


def shard_of(first: int, count: int) -> TableShard:
    rows = slice(first, first + count)
    return TableShard("item", first, 0, TABLE[rows].clone(), {"momentum1": TABLE[rows, 0].clone()})


def save(store: Store, step: int, token: int = 1) -> None:
    store.remove_unfinished()
    path = store.path(step)
    for rank, (first, count) in enumerate(((0, 3000), (3000, 2000))):
        write.write_part(path, rank, token, [shard_of(first, count)])
    whole = write.Whole({"parameter.w": torch.ones(3)}, Progress("hash", step, best_step=step), "world_size: 2\n")
    write.seal(path, token, 2, whole, seconds=20)
    store.keep(CheckpointConfig(), step)


@pytest.fixture
def store(s3) -> Store:
    return Store.of(Path("runs/x"), CheckpointConfig(path=f"{s3.url}/ckpt"))


def test_saved_and_read_by_other_ranks_with_no_more_bytes_than_their_rows(s3, store: Store) -> None:
    save(store, 1)
    save(store, 2)
    assert {name.split("/")[1] for name in s3.names("ckpt/")} == {"step-00000002"}
    newest = store.newest()
    newest.verify()
    assert not [name for name in s3.names("ckpt/") if "part-" in name]
    found = TableShard("item", 2990, 0, torch.zeros(20, 64), {"momentum1": torch.zeros(20)})
    newest.read_shard(found)
    assert torch.equal(found.rows, TABLE[2990:3010])
    assert torch.equal(found.optimizer["momentum1"], TABLE[2990:3010, 0])


def test_without_complete_it_is_not_there_and_goes_at_the_next_save(s3, store: Store) -> None:
    save(store, 1)
    s3.put("ckpt/step-00000002/table-00000-00.safetensors", b"torn")
    s3.put("ckpt/step-00000002/part-00000.json", b'{"token": 1, "files": {}, "tables": []}')
    assert store.newest().progress.step == 1
    save(store, 3, token=2)
    assert {name.split("/")[1] for name in s3.names("ckpt/")} == {"step-00000003"}


def test_damage_is_named_with_its_address(s3, store: Store) -> None:
    save(store, 1)
    name = "ckpt/step-00000001/table-00001-00.safetensors"
    content = bytearray(s3.get(name))
    content[-1] ^= 1
    s3.put(name, bytes(content))
    with pytest.raises(GenattError, match=rf"{s3.url}/ckpt/step-00000001: table-00001-00\.safetensors has sha256"):
        store.newest().verify()


def test_a_store_that_refuses_is_one_line(s3, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAWRONG")
    with pytest.raises(GenattError, match=r"cannot (read|write) s3://.*check AWS_ACCESS_KEY_ID"):
        save(store, 1)


@pytest.mark.exhaustive
def test_a_run_keeps_its_checkpoints_there_and_is_served_from_there(s3, tmp_path: Path) -> None:
    write_prepared(tmp_path / "data", [[10 * (1 + (user + place) % 20) for place in range(8)] for user in range(40)])
    where = f"{s3.url}/runs/a"
    config = run_config(tmp_path / "data", training={"checkpoint": {"path": where}, "checkpoint_every": 1})
    runs.train(config, tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoints").exists()
    listed = inventory.checkpoints(tmp_path / "run", verify=True, out=str(tmp_path / "bundle"))
    assert listed.place == where
    assert any(one.best for one in listed.checkpoints)
    trained, bundled = load(tmp_path / "run"), load(tmp_path / "bundle")
    assert torch.equal(trained.table.weight, bundled.table.weight)
    with pytest.raises(GenattError, match=r"training\.checkpoint\.path=s3://.* holds checkpoints already"):
        runs.train(config, tmp_path / "another")
