"""A checkpoint is complete or it does not count, holds no pickle, and knows nothing of ranks."""

import json
import os
from pathlib import Path

import pytest
import torch

from data_pipeline.errors import GenattError
from genatt_dist.training import checkpoint
from genatt_dist.training.checkpoint import Progress, TablePart

CONFIG = "world_size: 1\n"
DENSE = {"parameter.w": torch.arange(6.0).view(2, 3), "exp_avg.w": torch.ones(2, 3), "buffer.s": torch.tensor(2.5)}
ROWS, WIDTH = 11, 4
TABLE = torch.arange(float(ROWS * WIDTH)).view(ROWS, WIDTH)
MOMENT = torch.arange(float(ROWS)) * 10


def save(run: Path, step: int, ranks: tuple[int, ...] = (), best: int = -1, metric: float = 0.1) -> Path:
    """A checkpoint whose table was sharded into parts of these numbers of rows."""
    final = checkpoint.folder(run, step)
    path = checkpoint.prepare(final)
    first = 0
    for rank, count in enumerate(ranks):
        here = slice(first, first + count)
        checkpoint.write_table(path, rank, TablePart(first, TABLE[here], {"momentum": MOMENT[here]}))
        first += count
    progress = Progress(
        "hash", step, best_step=best if best >= 0 else step, best_metric=metric, best_metrics={"a": 0.5}
    )
    checkpoint.write_dense(path, DENSE, progress, CONFIG)
    checkpoint.publish(final, keep={checkpoint.folder(run, progress.best_step)})
    return final


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 0x01
    path.write_bytes(content)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = save(tmp_path, 12, ranks=(6, 5))
    checkpoint.verify(path)
    tensors = checkpoint.read_dense(path)
    assert tensors.keys() == DENSE.keys()
    assert all(torch.equal(tensors[name], DENSE[name]) for name in DENSE)
    progress = checkpoint.read_progress(path)
    assert (progress.step, progress.manifest_hash, progress.best_metrics) == (12, "hash", {"a": 0.5})


def test_only_safetensors_and_json_and_a_sum_of_each_file(tmp_path: Path) -> None:
    path = save(tmp_path, 3, ranks=(4, 7))
    assert path.name == "step-00000003"
    names = {file.name for file in path.iterdir()}
    tables = {"table-00000.safetensors", "table-00001.safetensors"}
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
    path = save(tmp_path, 1, ranks=written)
    first = 0
    for count in read:
        part = checkpoint.read_table(path, first, count)
        assert part is not None
        assert part.first_row == first
        assert torch.equal(part.rows, TABLE[first : first + count])
        assert torch.equal(part.optimizer["momentum"], MOMENT[first : first + count])
        first += count


def test_a_checkpoint_without_a_table_says_so(tmp_path: Path) -> None:
    assert checkpoint.read_table(save(tmp_path, 1), 0, ROWS) is None


def test_too_few_rows_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(GenattError, match=r"holds 11 of the table rows 0\.\.14"):
        checkpoint.read_table(save(tmp_path, 1, ranks=(6, 5)), 0, 15)


def test_optimizer_state_is_left_out_where_not_wanted(tmp_path: Path) -> None:
    part = checkpoint.read_table(save(tmp_path, 1, ranks=(6, 5)), 0, ROWS, with_optimizer=False)
    assert part is not None
    assert part.optimizer == {}


def test_an_incomplete_checkpoint_does_not_count(tmp_path: Path) -> None:
    with pytest.raises(GenattError, match="holds no complete checkpoint"):
        checkpoint.newest(tmp_path)
    complete = save(tmp_path, 10)
    unfinished = checkpoint.prepare(checkpoint.folder(tmp_path, 20))
    checkpoint.write_dense(unfinished, DENSE, Progress("hash", 20), CONFIG)
    assert checkpoint.newest(tmp_path) == complete
    (unfinished / "COMPLETE").write_text("{}")  # the process ended before it had its name
    assert checkpoint.newest(tmp_path) == complete


def test_steps_are_ordered_as_numbers(tmp_path: Path) -> None:
    save(tmp_path, 9)
    later = save(tmp_path, 1000, best=9)
    assert checkpoint.newest(tmp_path) == later


def test_older_ones_go_when_a_newer_one_is_complete_but_the_best_stays(tmp_path: Path) -> None:
    for step, best in ((1, 1), (2, 2), (3, 2), (4, 2)):
        save(tmp_path, step, best=best)
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"step-00000002", "step-00000004"}
    assert checkpoint.best(tmp_path) == checkpoint.folder(tmp_path, 2)
    assert checkpoint.newest(tmp_path) == checkpoint.folder(tmp_path, 4)


def test_nothing_is_deleted_before_the_new_one_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = save(tmp_path, 1)

    def broken(self: Path, target: Path) -> Path:
        raise OSError("no space left")

    monkeypatch.setattr(Path, "rename", broken)
    with pytest.raises(OSError, match="no space left"):
        save(tmp_path, 2)
    monkeypatch.undo()
    checkpoint.verify(checkpoint.newest(tmp_path))
    assert checkpoint.newest(tmp_path) == old


def test_before_any_validation_the_newest_is_served(tmp_path: Path) -> None:
    newest = save(tmp_path, 5, best=-1)
    assert checkpoint.best(tmp_path) == newest


def test_a_lost_best_checkpoint_is_an_error_and_not_another_model(tmp_path: Path) -> None:
    save(tmp_path, 5, best=4)
    with pytest.raises(GenattError, match="step-00000004 is missing"):
        checkpoint.best(tmp_path)


@pytest.mark.parametrize("name", ["dense.safetensors", "progress.json", "table-00001.safetensors"])
def test_a_changed_file_is_named_with_both_sums(name: str, tmp_path: Path) -> None:
    path = save(tmp_path, 1, ranks=(6, 5))
    damage(path / name)
    with pytest.raises(
        GenattError, match=rf"{name} has sha256 \w{{12}}…, \w{{12}}… was written; remove this checkpoint"
    ):
        checkpoint.verify(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    path = save(tmp_path, 1, ranks=(6, 5))
    os.remove(path / "table-00000.safetensors")
    with pytest.raises(GenattError, match=r"table-00000\.safetensors is missing"):
        checkpoint.verify(path)


def test_a_damaged_seal_or_progress_is_an_error_and_no_traceback(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    (path / "progress.json").write_text('{"step": 1')
    with pytest.raises(GenattError, match=r"cannot read progress\.json"):
        checkpoint.best(tmp_path)
    (path / "COMPLETE").write_text("")
    with pytest.raises(GenattError, match="COMPLETE is damaged"):
        checkpoint.verify(path)
