"""Killed while it saves, a run goes on from its newest complete checkpoint, never from a torn or a mixed one.

Every save writes its step's number into every row and every weight, so a mixture of two saves would show.
"""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch

from data_pipeline.errors import GenattError
from genatt_dist import config as configuration
from genatt_dist.embedding.table import TableShard
from genatt_dist.training.checkpoint.progress import Progress
from genatt_dist.training.checkpoint.store import Store
from genatt_dist.training.options import CheckpointConfig

ROWS, WIDTH, WORLD = 60_000, 16, 2
_LONGEST_SECONDS = 0.6  # several saves


class Engine:
    """A dense model whose weights are the number of the step."""

    step = 0

    def state(self, keep: bool = True) -> dict[str, torch.Tensor]:
        return {"parameter.w": torch.full((1000, 50), float(self.step))} if keep else {}


class Table:
    """This rank's half of a table whose rows and state are the number of the step."""

    def __init__(self, rank: int) -> None:
        self.shards = [TableShard("item", rank * ROWS, 0, torch.zeros(ROWS, WIDTH), {"momentum1": torch.zeros(ROWS)})]

    def fill(self, step: int) -> None:
        for shard in self.shards:
            shard.rows.fill_(step)
            shard.optimizer["momentum1"].fill_(step)


def save_until_killed(run: Path, background: bool, seconds: float | None, steps: int = 10**6) -> None:
    """Save without a pause on this rank; killed so many seconds after the first complete one (None: let it end)."""
    import torch.distributed as dist

    from genatt_dist.training.saving import Saver

    checkpoint = CheckpointConfig(background=background, keep_last=2)
    config = configuration.parse({"data": {"path": "x"}, "training": {"checkpoint": checkpoint.model_dump()}}, "a test")
    engine, table, store = Engine(), Table(dist.get_rank()), Store.of(run, checkpoint)
    first = max(store.complete(), default=0) + 1
    dist.barrier()  # both have looked
    with Saver(store, config, engine, table, torch.device("cpu")) as saver:  # type: ignore[arg-type]
        for step in range(first, first + steps):
            engine.step = step
            table.fill(step)
            saver.save(Progress("hash", step, best_step=1))
            if step == first:
                saver.wait()
                dist.barrier()
                if seconds is not None:
                    threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()
            saver.check()


def check_newest(run: Path) -> int:
    """The newest complete checkpoint is whole and of one step. Returns its step."""
    newest = Store.of(run, CheckpointConfig()).newest()
    newest.verify()
    step = newest.progress.step
    assert newest.path.endswith(f"step-{step:08d}")
    whole = TableShard("item", 0, 0, torch.zeros(WORLD * ROWS, WIDTH), {"momentum1": torch.zeros(WORLD * ROWS)})
    newest.read_shard(whole)
    assert all((value == step).all() for value in (whole.rows, whole.optimizer["momentum1"], *newest.dense().values()))
    return step


def kill_and_go_on(run: Path, kills: int, background: bool) -> list[int]:
    """Kill both ranks at random moments, one after another; the steps that were complete each time."""
    moments, complete = random.Random(f"{kills} {background}"), []
    for _ in range(kills):
        with pytest.raises(ranks.RankError, match="died without a word"):
            ranks.run_in_group(save_until_killed, WORLD, run, background, moments.uniform(0, _LONGEST_SECONDS))
        complete.append(check_newest(run))
    ranks.run_in_group(save_until_killed, WORLD, run, background, None, 1)
    assert check_newest(run) == complete[-1] + 1
    left = {name for name, files in Store.of(run, CheckpointConfig()).contents().items() if "COMPLETE" not in files}
    assert not left
    return complete


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(("background", "kills"), [(True, 2), (False, 1)])
def test_killed_while_saving(background: bool, kills: int, tmp_path: Path) -> None:
    complete = kill_and_go_on(tmp_path, kills, background)
    assert complete == sorted(complete)


@pytest.mark.exhaustive
@pytest.mark.distributed
@pytest.mark.parametrize("background", [True, False])
def test_killed_at_twenty_random_points(background: bool, tmp_path: Path) -> None:
    complete = kill_and_go_on(tmp_path, 20, background)
    print(f"complete at each kill: {complete}")
    assert complete == sorted(complete)
    assert len(set(complete)) > 10


class TestWhatFailsWhileWriting:
    """One process is enough: rank 0 of one."""

    @pytest.fixture
    def make_saver(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Any]:
        from genatt_dist.training import saving

        for name, value in {"get_rank": 0, "get_world_size": 1}.items():
            monkeypatch.setattr(saving.dist, name, lambda value=value: value)
        for name in ("broadcast", "barrier"):
            monkeypatch.setattr(saving.dist, name, lambda *_: None)

        def make(background: bool) -> saving.Saver:
            checkpoint = CheckpointConfig(background=background)
            tree = {"data": {"path": "x"}, "training": {"checkpoint": checkpoint.model_dump()}}
            config, table = configuration.parse(tree, "a test"), Table(0)
            store = Store.of(tmp_path, checkpoint)
            return saving.Saver(store, config, Engine(), table, torch.device("cpu"))  # type: ignore[arg-type]

        return make

    @pytest.mark.parametrize("background", [True, False])
    def test_a_full_disk_is_one_line_and_the_older_one_stays(
        self, make_saver: Callable[..., Any], background: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        saver = make_saver(background)
        saver.save(Progress("hash", 1))
        saver.wait()

        def full(*_: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)

        def fail() -> None:
            saver.save(Progress("hash", 2))
            saver.wait()

        with pytest.raises(
            GenattError,
            match=r"cannot write a checkpoint of step 2 into .*: \[Errno 28\] No space left on device; free",
        ):
            fail()
        assert Store.of(tmp_path, CheckpointConfig()).complete() == [1]

    def test_training_goes_on_meanwhile_with_what_was_copied(
        self, make_saver: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from genatt_dist.training import saving

        may_write = threading.Event()
        write_part = saving.write_part
        monkeypatch.setattr(saving, "write_part", lambda *of: (may_write.wait(10), write_part(*of)))
        saver = make_saver(True)
        progress = Progress("hash", 7)
        began = time.monotonic()
        saver.save(progress)
        assert time.monotonic() - began < 5
        saver._table.fill(9)
        progress.step = 9
        may_write.set()
        saver.wait()
        newest = Store.of(tmp_path, CheckpointConfig()).newest()
        found = TableShard("item", 0, 0, torch.ones(ROWS, WIDTH), {"momentum1": torch.ones(ROWS)})
        newest.read_shard(found)
        assert newest.progress.step == 7
        assert not found.rows.any()
        assert not found.optimizer["momentum1"].any()

    def test_a_step_is_saved_once(self, make_saver: Callable[..., Any]) -> None:
        saver = make_saver(False)
        saver.save(Progress("hash", 1))
        with pytest.raises(GenattError, match="step-00000001 is complete already"):
            saver.save(Progress("hash", 1))
