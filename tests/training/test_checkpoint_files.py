"""A checkpoint is complete or it does not count, holds no pickle, and knows nothing of ranks."""

import json
import os
import pickle
import shutil
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from data_pipeline.errors import GenattError
from genatt_dist.embedding.table import TableShard
from genatt_dist.training.checkpoint import files, tensors, write
from genatt_dist.training.checkpoint.progress import Progress
from genatt_dist.training.checkpoint.read import Checkpoint
from genatt_dist.training.checkpoint.store import Store
from genatt_dist.training.options import CheckpointConfig

CONFIG = "world_size: 1\n"
DENSE = {"parameter.w": torch.arange(6.0).view(2, 3), "exp_avg.w": torch.ones(2, 3), "buffer.s": torch.tensor(2.5)}
ROWS, WIDTH = 11, 4
TABLE = torch.arange(float(ROWS * WIDTH)).view(ROWS, WIDTH)
MOMENT = torch.arange(float(ROWS)) * 10
SQUARES = TABLE * 7
TOKEN = 5


def store_of(run: Path) -> Store:
    return Store.of(run, CheckpointConfig())


def shard_of(first: int, count: int, left: int = 0, width: int = WIDTH, name: str = "item") -> TableShard:
    """A part of the table, with state by element, and by row where whole rows are in it."""
    rows, columns = slice(first, first + count), slice(left, left + width)
    state = {"squares": SQUARES[rows, columns]} | ({"moment": MOMENT[rows]} if width == WIDTH else {})
    return TableShard(name, first, left, TABLE[rows, columns], state)


def blank(shard: TableShard, fill: float = -1.0) -> TableShard:
    state = {name: torch.full_like(value, fill) for name, value in shard.optimizer.items()}
    return TableShard(shard.name, shard.first_row, shard.first_column, torch.full_like(shard.rows, fill), state)


def consecutive(counts: tuple[int, ...]) -> list[TableShard]:
    firsts = [sum(counts[:index]) for index in range(len(counts))]
    return [shard_of(first, count) for first, count in zip(firsts, counts, strict=True)]


def equal(left: TableShard, right: TableShard) -> bool:
    states = all(torch.equal(left.optimizer[name], right.optimizer[name]) for name in left.optimizer)
    return torch.equal(left.rows, right.rows) and left.optimizer.keys() == right.optimizer.keys() and states


def save(
    run: Path,
    step: int,
    ranks: tuple[int, ...] | list[list[TableShard]] = (),
    best: int = -1,
    metric: float = 0.1,
    config: CheckpointConfig | None = None,
) -> Path:
    """A checkpoint whose table was sharded into parts of these numbers of rows."""
    store = store_of(run)
    store.remove_unfinished()
    path = store.path(step)
    parts = ranks if isinstance(ranks, list) else [[shard] for shard in consecutive(ranks)] or [[]]
    for rank, shards in enumerate(parts):
        write.write_part(path, rank, TOKEN, shards)
    progress = Progress(
        "hash", step, best_step=best if best >= 0 else step, metric=metric, best_metric=metric, best_metrics={"a": 0.5}
    )
    write.seal(path, TOKEN, len(parts), write.Whole(DENSE, progress, CONFIG))
    store.keep(config or CheckpointConfig(), progress.best_step)
    return Path(path)


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 0x01
    path.write_bytes(content)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    source = Checkpoint.open(str(save(tmp_path, 12, ranks=(6, 5))))
    source.verify()
    found = source.dense()
    assert found.keys() == DENSE.keys()
    assert all(torch.equal(found[name], DENSE[name]) for name in DENSE)
    progress = source.progress
    assert (progress.step, progress.manifest_hash, progress.best_metrics) == (12, "hash", {"a": 0.5})


def test_only_safetensors_and_json_and_a_sum_of_each_file(tmp_path: Path) -> None:
    path = save(tmp_path, 3, ranks=(4, 7))
    assert path.name == "step-00000003"
    names = {file.name for file in path.iterdir()}
    tables = {"table-00000-00.safetensors", "table-00001-00.safetensors", "tables.json"}
    assert names == {"dense.safetensors", "progress.json", "config.yaml", "COMPLETE"} | tables
    assert json.loads((path / "COMPLETE").read_text()).keys() == names - {"COMPLETE"}
    for file in path.glob("*.safetensors"):  # eight bytes of length, then JSON: no pickle anywhere
        content = file.read_bytes()
        json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])


@pytest.mark.parametrize("written", [(11,), (6, 5), (4, 4, 3), (3, 8)])
@pytest.mark.parametrize("read", [(11,), (6, 5), (4, 4, 3), (10, 1)])
def test_table_rows_are_read_back_by_any_number_of_ranks(
    written: tuple[int, ...], read: tuple[int, ...], tmp_path: Path
) -> None:
    source = Checkpoint.open(str(save(tmp_path, 1, ranks=written)))
    for expected in consecutive(read):
        found = blank(expected)
        source.read_shard(found)
        assert equal(found, expected)


def test_parts_by_columns_and_several_tables_are_read_back_by_rows(tmp_path: Path) -> None:
    parts = [[shard_of(0, ROWS, 0, 3)], [shard_of(0, ROWS, 3, 1), shard_of(0, 4, name="genre")]]
    source = Checkpoint.open(str(save(tmp_path, 1, ranks=parts)))
    rows = TableShard("item", 2, 0, torch.zeros(5, WIDTH), {"squares": torch.zeros(5, WIDTH)})
    source.read_shard(rows)
    assert torch.equal(rows.rows, TABLE[2:7])
    assert torch.equal(rows.optimizer["squares"], SQUARES[2:7])
    assert [source.table_shape(name) for name in ("item", "genre", "year")] == [(ROWS, WIDTH), (4, WIDTH), (0, 0)]


def test_state_of_rows_cut_by_columns_is_not_taken_for_that_of_whole_rows(tmp_path: Path) -> None:
    halves = [TableShard("item", 0, left, TABLE[:, left : left + 2], {"moment": MOMENT + left}) for left in (0, 2)]
    source = Checkpoint.open(str(save(tmp_path, 1, ranks=[halves])))
    again = [blank(half) for half in halves]
    for half, expected in zip(again, halves, strict=True):
        source.read_shard(half)
        assert equal(half, expected)
    whole = TableShard("item", 0, 0, torch.zeros(ROWS, WIDTH), {"moment": torch.zeros(ROWS)})
    with pytest.raises(GenattError, match=r"moment of table item is one number a row of columns 0\.\.1"):
        source.read_shard(whole)


def test_rows_beyond_a_grown_table_stay_as_they_are(tmp_path: Path) -> None:
    source = Checkpoint.open(str(save(tmp_path, 1, ranks=(6, 5))))
    grown = TableShard("item", 9, 0, torch.full((4, WIDTH), -1.0), {"moment": torch.full((4,), -1.0)})
    source.read_shard(grown)
    assert torch.equal(grown.rows, torch.cat((TABLE[9:], torch.full((2, WIDTH), -1.0))))
    assert grown.optimizer["moment"].tolist() == [90, 100, -1, -1]


def test_missing_rows_are_an_error(tmp_path: Path) -> None:
    source = Checkpoint.open(str(save(tmp_path, 1, ranks=[[shard_of(0, 3)], [shard_of(5, 6)]])))
    with pytest.raises(GenattError, match=r"holds 9 of the rows 0\.\.10 of table item"):
        source.read_shard(blank(shard_of(0, ROWS)))


def test_optimizer_state_is_left_out_where_not_wanted(tmp_path: Path) -> None:
    source, found = Checkpoint.open(str(save(tmp_path, 1, ranks=(6, 5)))), blank(shard_of(0, ROWS))
    source.read_shard(found, with_optimizer=False)
    assert torch.equal(found.rows, TABLE)
    assert (found.optimizer["moment"] == -1).all()


def test_files_are_those_of_the_safetensors_library(tmp_path: Path) -> None:
    every = {
        "bf16": torch.randn(3, 5).bfloat16(),
        "fp16": torch.randn(7).half(),
        "flags": torch.tensor([True, False, True]),
        "ids": torch.arange(4),
        "nothing": torch.empty(0, 4),
        "number": torch.tensor(1.5, dtype=torch.float64),
        "columns": torch.randn(6, 4)[:, 1:3],
    }
    ours, theirs = str(tmp_path / "ours.safetensors"), str(tmp_path / "theirs.safetensors")
    files.write(ours, tensors.serialise({name: tensors.of(value) for name, value in every.items()}))
    save_file({name: value.contiguous() for name, value in every.items()}, theirs, metadata={"format": "pt"})
    read = load_file(ours)
    assert read.keys() == every.keys()
    assert all(torch.equal(read[name], every[name]) for name in every)
    for name, entry in tensors.entries(theirs).items():
        found = tensors.read(theirs, entry)
        assert found.dtype == every[name].dtype
        assert torch.equal(found, every[name])


def test_many_blocks_are_one_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensors, "_BLOCK_BYTES", 40)
    source = Checkpoint.open(str(save(tmp_path, 1, ranks=(6, 5))))
    found = blank(shard_of(1, 9))
    source.read_shard(found)
    assert equal(found, shard_of(1, 9))


def test_an_incomplete_checkpoint_does_not_count_and_goes_at_the_next_save(tmp_path: Path) -> None:
    store = store_of(tmp_path)
    with pytest.raises(GenattError, match="holds no complete checkpoint"):
        store.newest()
    complete = save(tmp_path, 10)
    write.write_part(store.path(20), 0, TOKEN, [shard_of(0, 3)])
    (tmp_path / "checkpoints" / "step-00000020" / "COMPLETE.tmp").write_text("{}")  # killed right before the end
    assert store.newest().path == str(complete)
    with pytest.raises(GenattError, match="is not complete"):
        store.at(20)
    newer = save(tmp_path, 30)
    assert store.newest().path == str(newer)
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {newer.name}


def test_a_copy_under_another_name_is_no_checkpoint_and_stays(tmp_path: Path) -> None:
    complete = save(tmp_path, 10)
    copies = [complete.with_name(name) for name in ("step-00000010.bak", "step-00000010-old", "step-copy")]
    for copy in copies:
        shutil.copytree(complete, copy)
    assert store_of(tmp_path).contents().keys() == {complete.name}
    newer = save(tmp_path, 30)
    assert sorted((tmp_path / "checkpoints").iterdir()) == sorted([*copies, newer])


def test_steps_are_ordered_as_numbers(tmp_path: Path) -> None:
    save(tmp_path, 9)
    later = save(tmp_path, 1000, best=9)
    assert store_of(tmp_path).newest().path == str(later)


def test_older_ones_go_when_a_newer_one_is_complete_but_the_best_stays(tmp_path: Path) -> None:
    for step, best in ((1, 1), (2, 2), (3, 2), (4, 2)):
        save(tmp_path, step, best=best)
    store = store_of(tmp_path)
    assert store.complete() == [2, 4]
    assert (store.best().path, store.newest().path) == (store.path(2), store.path(4))


def test_as_many_of_the_newest_and_of_the_best_are_kept_as_asked(tmp_path: Path) -> None:
    config = CheckpointConfig(keep_last=2, keep_best=2)
    metrics = {1: 0.5, 2: 0.9, 3: 0.9, 4: 0.1, 5: 0.2, 6: 0.3}
    for step, metric in metrics.items():
        save(tmp_path, step, best=1 if step == 1 else 2, metric=metric, config=config)
    assert store_of(tmp_path).complete() == [2, 3, 5, 6]


def test_nothing_is_deleted_before_the_new_one_is_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = save(tmp_path, 1)

    def broken(source: str, target: str) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "rename", broken)
    with pytest.raises(OSError, match="no space left"):
        save(tmp_path, 2)
    monkeypatch.undo()
    newest = store_of(tmp_path).newest()
    newest.verify()
    assert newest.path == str(old)


def test_a_removal_that_was_stopped_leaves_an_unfinished_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Never one that is complete by name and lacks a file."""
    old = save(tmp_path, 1, ranks=(6, 5))
    removed = []
    from fsspec.implementations.local import LocalFileSystem

    def stopped(self: LocalFileSystem, path: str, recursive: bool = False) -> None:
        removed.append(path)
        if len(removed) == 3:  # the parts of the new one, COMPLETE of the old one, then its directory
            raise KeyboardInterrupt
        for name in [path] if isinstance(path, str) else path:
            os.remove(name)

    monkeypatch.setattr(LocalFileSystem, "rm", stopped)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 2)
    monkeypatch.undo()
    assert old.exists()
    assert store_of(tmp_path).complete() == [2]


def test_before_any_validation_the_newest_is_served(tmp_path: Path) -> None:
    newest = save(tmp_path, 5, best=-1)
    assert store_of(tmp_path).best().path == str(newest)


def test_a_lost_best_checkpoint_is_an_error_and_not_another_model(tmp_path: Path) -> None:
    save(tmp_path, 5, best=4)
    with pytest.raises(GenattError, match="step-00000004 is missing"):
        store_of(tmp_path).best()


def test_rank_0_takes_no_part_of_a_killed_save_and_waits_for_the_new_one(tmp_path: Path) -> None:
    path = store_of(tmp_path).path(1)
    write.write_part(path, 0, TOKEN, [shard_of(0, 6)])
    write.write_part(path, 1, TOKEN - 1, [shard_of(6, 2)])  # of the killed save

    def late() -> None:
        time.sleep(0.2)
        write.write_part(path, 1, TOKEN, [shard_of(6, 5)])

    thread = threading.Thread(target=late)
    thread.start()
    write.seal(path, TOKEN, 2, write.Whole(DENSE, Progress("hash", 1), CONFIG))
    thread.join()
    source = Checkpoint.open(path)
    source.verify()
    assert source.table_shape("item") == (ROWS, WIDTH)


def test_a_rank_that_failed_or_is_gone_is_named(tmp_path: Path) -> None:
    path, whole = store_of(tmp_path).path(1), write.Whole(DENSE, Progress("hash", 1), CONFIG)
    write.write_part(path, 0, TOKEN, [])
    with pytest.raises(GenattError, match=r"rank 1 has not written its part 0 s after rank 0"):
        write.seal(path, TOKEN, 2, whole, seconds=0.1)
    broken = TableShard("item", 0, 0, TABLE.to(torch.complex64), {})
    with pytest.raises(KeyError):
        write.write_part(path, 1, TOKEN, [broken])
    with pytest.raises(GenattError, match=r"rank 1 could not write its part: torch\.complex64"):
        write.seal(path, TOKEN, 2, whole, seconds=10)
    assert store_of(tmp_path).complete() == []


@pytest.mark.parametrize("name", ["dense.safetensors", "progress.json", "table-00001-00.safetensors", "tables.json"])
def test_a_changed_file_is_named_with_both_sums(name: str, tmp_path: Path) -> None:
    path = save(tmp_path, 1, ranks=(6, 5))
    damage(path / name)
    with pytest.raises(
        GenattError, match=rf"{name} has sha256 \w{{12}}…, \w{{12}}… was written; remove this checkpoint"
    ):
        Checkpoint.open(str(path)).verify()


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    path = save(tmp_path, 1, ranks=(6, 5))
    os.remove(path / "table-00000-00.safetensors")
    with pytest.raises(GenattError, match=r"table-00000-00\.safetensors is missing"):
        Checkpoint.open(str(path)).verify()


def test_a_damaged_seal_or_progress_is_an_error_and_no_traceback(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    (path / "progress.json").write_text('{"step": 1')
    with pytest.raises(GenattError, match=r"cannot read progress\.json"):
        store_of(tmp_path).best()
    for content in ("", "[]", '{"dense.safetensors": 1}'):
        (path / "COMPLETE").write_text(content)
        with pytest.raises(GenattError, match="COMPLETE is damaged"):
            Checkpoint.open(str(path))


class TestWhatIsNeverRead:
    """A checkpoint may come from anywhere: nothing of it is executed, and nothing outside of it is opened."""

    @pytest.mark.parametrize(
        "name", ["../secret.json", "/etc/secret.json", "a/../../secret.json", "dense.pt", "model.pkl", "x.json\n", ""]
    )
    def test_a_name_that_leads_out_or_is_no_safe_kind(self, name: str, tmp_path: Path) -> None:
        path = save(tmp_path, 1)
        sums = json.loads((path / "COMPLETE").read_text())
        (path / "COMPLETE").write_text(json.dumps(sums | {name: "0" * 64}))
        with pytest.raises(GenattError, match="only plain names of safetensors, JSON and YAML files are read"):
            Checkpoint.open(str(path))

    def test_a_table_that_names_a_file_nobody_vouches_for(self, tmp_path: Path) -> None:
        path = save(tmp_path, 1, ranks=(6, 5))
        tables = json.loads((path / "tables.json").read_text())
        tables[0]["file"] = "../other.safetensors"
        (path / "tables.json").write_text(json.dumps(tables))
        with pytest.raises(GenattError, match=r"has no \.\./other\.safetensors"):
            Checkpoint.open(str(path)).read_shard(blank(shard_of(0, ROWS)))

    def test_a_link_that_leads_out(self, tmp_path: Path) -> None:
        path = save(tmp_path / "run", 1)
        (path / "dense.safetensors").rename(tmp_path / "dense.safetensors")
        (path / "dense.safetensors").symlink_to(tmp_path / "dense.safetensors")
        with pytest.raises(GenattError, match=r"dense\.safetensors is a link to .*outside of it"):
            Checkpoint.open(str(path))

    def test_a_whole_checkpoint_that_is_a_link(self, tmp_path: Path) -> None:
        foreign = save(tmp_path / "foreign", 3)
        (tmp_path / "run" / "checkpoints").mkdir(parents=True)
        (tmp_path / "run" / "checkpoints" / foreign.name).symlink_to(foreign)
        with pytest.raises(GenattError, match=r"is a link to .*outside of the run"):
            store_of(tmp_path / "run").at(3)

    def test_a_pickle_under_a_safe_name(self, tmp_path: Path) -> None:
        path, touched = save(tmp_path, 1), tmp_path / "touched"

        class Harm:
            def __reduce__(self) -> tuple[object, tuple[str]]:
                return os.mkdir, (str(touched),)

        for content in (pickle.dumps(Harm()), b"\x80\x02", b"", b"\x10" + bytes(15), b"\2" + bytes(7) + b"[]"):
            (path / "dense.safetensors").write_bytes(content)
            with pytest.raises(GenattError, match=r"dense\.safetensors is no safetensors file"):
                Checkpoint.open(str(path)).dense()
        assert not touched.exists()

    @pytest.mark.parametrize(
        "entry",
        [
            {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]},
            {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]},
            {"dtype": "F32", "shape": [-1], "data_offsets": [4, 0]},
            {"dtype": "O", "shape": [1], "data_offsets": [0, 8]},
            {"dtype": "F32", "shape": 1, "data_offsets": [0, 4]},
            [],
        ],
    )
    def test_a_header_that_lies(self, entry: object, tmp_path: Path) -> None:
        path = tmp_path / "x.safetensors"
        header = json.dumps({"w": entry}).encode()
        path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
        with pytest.raises(GenattError, match="is no safetensors file"):
            tensors.entries(str(path))
