"""Training batches from a bucket: the same as from disk, whatever passing faults there are; lasting ones are named."""

import threading
import time
from pathlib import Path

import pytest
import torch
from tiny_data import histories, write_prepared

from data_pipeline.errors import GenattError
from genatt_dist.config import DataConfig, TrainingConfig
from genatt_dist.data.batches import TrainingBatches
from genatt_dist.data.histories import evaluation_batches
from genatt_dist.data.sequences import Sequences

pytestmark = pytest.mark.s3
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 users in 3 shards of 13 row groups."""
    path = tmp_path_factory.mktemp("loader") / "set"
    write_prepared(path, histories(users=300), num_shards=3)
    return path


@pytest.fixture
def remote(local: Path, s3) -> str:
    for file in (path for path in local.rglob("*") if path.is_file()):
        s3.put(f"set/{file.relative_to(local)}", file.read_bytes())
    return f"{s3.url}/set"


def batches(path: str) -> list[list[int]]:
    """One epoch, streamed: three buffers, and little more than one of them in memory."""
    sequences = Sequences.read(path, prefetch_bytes=5000)
    data = DataConfig(path=path, max_len=8, shuffle_windows=80)
    plan = TrainingBatches.plan(sequences, data, TrainingConfig(batch_sequences=5))
    return [batch.items_M.tolist() for batch in plan.iterate(0, 0, 0, 1, CPU)]


def test_batches_from_a_bucket_are_those_from_disk(local: Path, remote: str) -> None:
    assert batches(remote) == batches(str(local))
    shown = [
        [batch.items_N.tolist() for batch in evaluation_batches(Sequences.read(path), "test", 5, 30, 0, 1, CPU)]
        for path in (remote, str(local))
    ]
    assert shown[0] == shown[1]


def test_each_row_group_is_asked_for_once_and_each_footer(remote: str, faults) -> None:
    batches(remote)
    # 39 row groups, 3 footers; footer and row groups are asked for side by side, never twice.
    assert faults.count("GET", key="set/shards/*") == 42


def test_passing_faults_are_not_noticed(local: Path, remote: str, faults) -> None:
    faults.fail(next_n=3, key="set/shards/*")
    faults.cut(next_n=2, key="set/shards/*")
    faults.refuse(next_n=1)
    assert batches(remote) == batches(str(local))
    assert faults.failed == 6


@pytest.mark.parametrize("what", ["refused", "vanished", "truncated"])
def test_lasting_faults_end_the_epoch_with_the_name_of_the_shard(
    what: str, remote: str, s3, faults, monkeypatch: pytest.MonkeyPatch
) -> None:
    from data_pipeline.s3 import S3

    monkeypatch.setattr(
        "data_pipeline.s3.S3.__init__.__kwdefaults__", S3.__init__.__kwdefaults__ | {"retry_seconds": 1}
    )
    shard = "set/shards/part-00001.parquet"
    if what == "truncated":
        s3.truncate(shard)
    elif what == "vanished":
        faults.vanish(shard, after=4)
    else:
        faults.fail_always(key=shard)
    began = time.monotonic()
    with pytest.raises(GenattError, match=r"part-00001\.parquet") as caught:
        batches(remote)
    assert time.monotonic() - began < 20
    assert "\n" not in str(caught.value)
    while any(thread.name.startswith("ahead") for thread in threading.enumerate()):
        assert time.monotonic() - began < 25
        time.sleep(0.01)
