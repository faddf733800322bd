"""A run that was asked to stop leaves a complete checkpoint and ends; resumed, it is the run that never stopped."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ranks

from data_pipeline.errors import GenattError, ResumableError
from genatt_dist import config as configuration
from genatt_dist import runs
from genatt_dist.config import RunConfig
from genatt_dist.data.batches import TrainingBatches
from genatt_dist.data.sequences import Sequences
from genatt_dist.data.windows import WINDOW_BITS
from genatt_dist.training.checkpoint.progress import Progress
from genatt_dist.training.checkpoint.store import Store
from genatt_dist.training.nonfinite import NONFINITE
from genatt_dist.training.signs import CHECKPOINT, END
from genatt_dist.training.stopped import STOPPED

pytestmark = pytest.mark.distributed

EPOCH = 12  # updates
_COMMON = ("training.epochs=2", "training.optimizer=adamw", "training.learning_rate=0.005", "training.patience=9")


def train(run: Path, resume: bool, signals: dict[str, tuple[int, int]]) -> str | None:
    """One rank of a run. signals: what this process sends itself, by when, as (rank, number): `step 13` is in update
    13, `validation 2` in the second batch ranked by this process, `saving 13` while that checkpoint is written, which
    takes 60 seconds by `slow 13` (0, 60). Returns what stopped it.
    """
    from genatt_dist.training import preemption, saving, trainer, validation
    from genatt_dist.training import train as entry

    preemption.handle_signals(lambda reason: None)
    update, ranked, seal = trainer.Trainer.update, validation.Validation._ranked, saving.seal
    counted = 0

    def meet(moment: str) -> None:
        rank, number = signals.get(moment, (-1, 0))
        if rank == int(os.environ["RANK"]):
            (run / "met").touch()
            os.kill(os.getpid(), number)
            while preemption.requested() is None:  # a thread reads it
                pass

    def updated(self: trainer.Trainer, *of: Any) -> Any:
        losses = update(self, *of)
        meet(f"step {self._progress.step + 1}")
        return losses

    def counting(self: validation.Validation, users: int) -> None:
        nonlocal counted
        counted += 1
        meet(f"validation {counted}")
        ranked(self, users)

    def sealed(path: str, *of: Any) -> None:
        step = int(path[-8:])
        meet(f"saving {step}")
        time.sleep(signals.get(f"slow {step}", (0, 0))[1])
        seal(path, *of)

    trainer.Trainer.update = updated  # type: ignore[method-assign]
    validation.Validation._ranked = counting  # type: ignore[method-assign]
    saving.seal = sealed
    try:
        entry.train(runs.read_config(run), run, "test", resume)
    except ResumableError as error:
        return str(error)
    return None


def fresh(run: Path, config: RunConfig) -> Path:
    run.mkdir(parents=True)
    (run / runs.CONFIG).write_text(configuration.dump(config))
    return run


def stopped(run: Path, resume: bool = False, world_size: int = 2, **moments: tuple[int, int]) -> dict[str, Any]:
    """Train until a signal stops it; what stopped.json says. The ranks' messages are one."""
    told = ranks.run(train, world_size, run, resume, {key.replace("_", " "): value for key, value in moments.items()})
    assert len(set(told)) == 1
    facts = json.loads((run / STOPPED).read_text())
    assert told[0] == (
        f"stopped by {facts['reason']} after step {facts['step']} (epoch {facts['epoch'] + 1}); go on from the "
        f"checkpoint of step {facts['checkpoint']} by the same command with --resume"
    )
    return facts


def finish(run: Path, world_size: int = 2) -> None:
    assert ranks.run(train, world_size, run, True, {}) == [None] * world_size
    assert not (run / STOPPED).exists()


def records(run: Path) -> dict[tuple[str, int], dict[str, float]]:
    """What the log says of training and validation, without times; each step as it was told last."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kept = ("loss", "generative_loss", "learning_rate", "ndcg@10", "recall@10", "attention_entropy/block0")
    return {
        (line["kind"], line["step"]): {name: line[name] for name in kept if name in line}
        for line in lines
        if line["kind"] in ("train", "valid")
    }


def progress(run: Path) -> Progress:
    return Store.of(run, runs.read_config(run).training.checkpoint).newest().progress


def ended(run: Path, moments: dict[str, tuple[int, int]]) -> None:
    """One rank that is expected to end its process: its code and its messages are left in files."""
    rank, leave = os.environ["RANK"], os._exit

    def told(code: int) -> None:
        (run / f"code-{rank}").write_text(str(code))
        leave(code)

    os._exit = told  # type: ignore[assignment]
    sys.stderr = (run / f"stderr-{rank}").open("w")
    train(run, False, moments)


def endings(run: Path) -> list[tuple[str, str]]:
    """(code, messages of errors) of the ranks that ended by themselves."""
    found = []
    for code in sorted(run.glob("code-*")):
        lines = (run / code.name.replace("code", "stderr")).read_text().splitlines(keepends=True)
        found.append((code.read_text(), "".join(line for line in lines if line.startswith("error"))))
    return found


def failed(run: Path) -> str:
    try:
        train(run, False, {})
    except GenattError as error:
        return str(error)
    return "no error"


def valid(run: Path) -> dict[str, float]:
    return json.loads((run / runs.SUMMARY).read_text())["valid"]


@pytest.fixture(scope="module")
def whole(make_config: Callable[..., RunConfig], tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, Path]:
    """A configuration, and its undisturbed run of two epochs."""
    config = make_config(*_COMMON)
    run = fresh(tmp_path_factory.mktemp("whole") / "run", config)
    assert ranks.run(train, 2, run, False, {}) == [None, None]
    return config, run


@pytest.mark.slow
def test_stopped_between_two_records_of_the_log(whole: tuple[RunConfig, Path], tmp_path: Path) -> None:
    """SIGTERM to one rank of two: both stop after the same update, at most one later. Then Ctrl-C at an epoch's end."""
    config, undisturbed = whole
    run = fresh(tmp_path / "run", config)
    facts = stopped(run, step_3=(1, signal.SIGTERM))
    assert facts["reason"] == "SIGTERM on rank 1"
    assert facts["checkpoint"] == facts["step"] == 4
    assert len(progress(run).pending) == 4
    facts = stopped(run, resume=True, step_11=(0, signal.SIGINT))
    assert facts["reason"] == "SIGINT on rank 0"
    assert facts["checkpoint"] == facts["step"] == EPOCH
    assert (progress(run).epoch, progress(run).batch, progress(run).metric) == (0, EPOCH, None)
    finish(run)
    assert records(run) == records(undisturbed)
    assert valid(run) == valid(undisturbed)


@pytest.mark.slow
def test_stopped_in_a_validation(whole: tuple[RunConfig, Path], tmp_path: Path) -> None:
    """It is done again when resumed, and then told by the checkpoint from before it: the last of this run."""
    config, undisturbed = whole
    run = fresh(tmp_path / "run", config)
    facts = stopped(run, validation_3=(0, signal.SIGTERM))
    assert (facts["epoch"], facts["checkpoint"]) == (1, 2 * EPOCH)
    assert (progress(run).batch, progress(run).metric) == (EPOCH, None)
    finish(run)
    assert records(run) == records(undisturbed)
    assert valid(run) == valid(undisturbed)
    newest = Store.of(run, config.training.checkpoint).newest()
    newest.verify()
    assert newest.progress.metric == progress(undisturbed).metric
    assert newest.progress.best_metrics == valid(run)


@pytest.mark.exhaustive
def test_stopped_while_a_checkpoint_is_written(whole: tuple[RunConfig, Path], tmp_path: Path) -> None:
    """In the background: it is completed, and then the one of the update that was ended."""
    config, undisturbed = whole
    training = config.training.model_copy(update={"checkpoint_every": 5})
    run = fresh(tmp_path / "run", config.model_copy(update={"training": training}))
    facts = stopped(run, saving_5=(0, signal.SIGTERM))
    assert facts["checkpoint"] == facts["step"] > 5
    finish(run)
    assert valid(run) == valid(undisturbed)


@pytest.mark.exhaustive
def test_one_rank_stops_at_once_and_two_go_on(whole: tuple[RunConfig, Path], tmp_path: Path) -> None:
    config, undisturbed = whole
    run = fresh(tmp_path / "run", config)
    facts = stopped(run, world_size=1, step_3=(0, signal.SIGTERM))
    assert facts["reason"] == "SIGTERM"
    assert facts["checkpoint"] == 3
    finish(run)
    ours, theirs = records(run), records(undisturbed)
    assert ours.keys() == theirs.keys()
    assert all(ours[key].get("loss") == pytest.approx(theirs[key].get("loss"), abs=1e-5) for key in ours)


@pytest.mark.slow
def test_stopped_before_the_first_record(make_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    """An epoch shorter than an interval of the log: what it took is in the checkpoint, which its validation tells."""
    config = make_config(*_COMMON[1:], "training.epochs=1", "training.batch_sequences=96")
    run = fresh(tmp_path / "run", config)
    steps = TrainingBatches.plan(Sequences.read(config.data.path), config.data, config.training).num_batches
    assert steps < 9
    facts = stopped(run, world_size=1, **{f"step_{steps}": (0, signal.SIGTERM)})
    assert facts["checkpoint"] == steps
    assert progress(run).step_seconds > 0
    finish(run, world_size=1)
    assert 0 < json.loads((run / runs.SUMMARY).read_text())["train"]["sequences_per_second"] < 1e6


def ending(run: Path) -> list[str]:
    """What a rank does one after the other; "sealed" is a checkpoint that took a while."""
    from genatt_dist.training import mark, saving

    told: list[str] = []
    at, seal = mark.Mark.at, saving.seal

    def marked(self: mark.Mark, operation: str | None) -> None:
        told.append(operation or "")
        at(self, operation)

    def sealed(*of: Any) -> None:
        time.sleep(0.5)
        seal(*of)
        told.append("sealed")

    mark.Mark.at, saving.seal = marked, sealed  # type: ignore[method-assign]
    assert train(run, False, {}) is None
    return told


def test_last_checkpoint_has_the_time_of_a_checkpoint(make_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    """Written in the background, it is waited for before the end, whose limit is a step's."""
    run = fresh(tmp_path / "run", make_config(*_COMMON[1:], "training.epochs=1", "training.batch_sequences=96"))
    ((*_, before, sealed, last),) = ranks.run(ending, 1, run)
    assert (before, sealed, last) == (CHECKPOINT, "sealed", END)


@pytest.mark.slow
def test_deadline_that_cannot_be_met(whole: tuple[RunConfig, Path], tmp_path: Path) -> None:
    """The processes end without a checkpoint, whatever their main threads wait for, and say so."""
    training = whole[0].training.model_copy(update={"stop_seconds": 1.0})
    run = fresh(tmp_path / "run", whole[0].model_copy(update={"training": training}))
    with pytest.raises(ranks.RankError, match="the process died without a word"):
        ranks.run(ended, 2, run, {"step 3": (1, signal.SIGTERM), "slow 4": (0, 60)})
    facts = json.loads((run / STOPPED).read_text())
    assert facts["checkpoint"] is None
    assert "no checkpoint was written within training.stop_seconds=1, this rank is in checkpoint" in facts["reason"]
    for code, text in endings(run):
        assert code == "75"
        assert "there is no checkpoint yet: run it again" in text


@pytest.mark.parametrize(
    ("number", "victim"),
    [
        pytest.param(signal.SIGKILL, 1, marks=pytest.mark.slow),
        pytest.param(signal.SIGSTOP, 1, marks=pytest.mark.slow),
        pytest.param(signal.SIGKILL, 0, marks=pytest.mark.exhaustive),
        pytest.param(signal.SIGSTOP, 0, marks=pytest.mark.exhaustive),
    ],
)
def test_rank_that_is_lost_is_named(
    whole: tuple[RunConfig, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, victim: int
) -> None:
    """Killed or stopped, as by a host that hangs: within silence_seconds and a little, with step and operation."""
    if number == signal.SIGKILL:  # the others have so long to say what they see
        monkeypatch.setattr(ranks, "_GRACE_SECONDS", 20.0)
    training = whole[0].training.model_copy(update={"silence_seconds": 5.0})
    run = fresh(tmp_path / "run", whole[0].model_copy(update={"training": training}))
    with pytest.raises(ranks.RankError):
        ranks.run(ended, 2, run, {"step 3": (victim, number)})
    facts = json.loads((run / STOPPED).read_text())
    seconds = facts["time"] - (run / "met").stat().st_mtime
    print(f"after {seconds:.1f} s: {facts['reason']}")
    lost, others = facts["reason"].split("; ")
    assert re.search(
        rf"rank {victim} \(host .*, pid \d+\) is lost: no sign of life for \d s, the last one in .* of step [123] ",
        lost,
    )
    assert re.fullmatch(rf"rank {1 - victim} is in .* of step [34] \(epoch 1\)", others)
    assert seconds < 5 + 4
    ((code, text),) = endings(run)
    assert code == "75"
    assert text == f"error (rank {1 - victim}): {facts['reason']}; there is no checkpoint yet: run it again\n"


@pytest.mark.slow
def test_loss_that_is_no_number_leaves_its_batch(make_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    config = make_config("training.learning_rate=1e30", "training.epochs=2")
    run = fresh(tmp_path / "run", config)
    told = ranks.run(failed, 2, run)
    facts = json.loads((run / NONFINITE).read_text())
    assert told[0] == told[1]
    assert told[0].startswith("loss is nan")
    assert f"at step {facts['step']} (epoch 1): lower training.learning_rate" in told[0]
    assert told[0].endswith(f"are in {run / NONFINITE}")
    assert facts["batch"] == facts["step"] - 1
    assert [part["rank"] for part in facts["ranks"]] == [0, 1]
    sequences = Sequences.read(config.data.path)
    plan = TrainingBatches.plan(sequences, config.data, config.training)
    windows = list(plan.epoch(0))[facts["batch"]]
    found = {(one["user"] << WINDOW_BITS) + one["window"]: one for part in facts["ranks"] for one in part["windows"]}
    assert sorted(found) == sorted(windows.id_B.tolist())
    assert {key: len(one["items"]) - 1 for key, one in found.items()} == dict(
        zip(windows.id_B.tolist(), windows.length_B.tolist(), strict=True)
    )
    assert not Store.of(run, config.training.checkpoint).complete()


def saved(run: Path, place: str) -> str:
    """What comes of saving weights of which one on rank 1's part, or a dense one, is no number."""
    import torch
    import torch.distributed as dist

    from genatt_dist.training.trainer import Trainer

    trainer = Trainer(run, runs.read_config(run), torch.device("cpu"), "test", resume=False)
    if place == "table" and dist.get_rank() == 1:
        trainer.learner.sharded.shards[0].rows[3, 2] = torch.inf
    if place == "dense":
        next(trainer.learner.dense.parameters()).data.view(-1)[0] = torch.nan
    try:
        trainer._checkpointing.saver.save(trainer._progress)
        trainer._checkpointing.saver.wait()
    except GenattError as error:
        return str(error)
    return "saved"


@pytest.mark.parametrize(("place", "told"), [("table", "table rows"), ("dense", "dense weights")])
def test_no_checkpoint_holds_a_number_that_is_none(
    make_config: Callable[..., RunConfig], tmp_path: Path, place: str, told: str
) -> None:
    run = fresh(tmp_path / "run", make_config("training.zero_stage=0"))
    assert ranks.run_in_group(saved, 2, run, place) == [f"{told} are not finite"] * 2
    assert not Store.of(run, runs.read_config(run).training.checkpoint).complete()


def hang(run: Path) -> None:
    """Two ranks, the first of which waits for the other's batch; nothing is trained."""
    import torch
    import torch.distributed as dist

    from genatt_dist.training.checkpoint.store import Store
    from genatt_dist.training.engine import init_process_group
    from genatt_dist.training.mark import Mark
    from genatt_dist.training.signs import UPDATE, Limits
    from genatt_dist.training.stopping import control_group
    from genatt_dist.training.watchdog import Watchdog, watched

    rank, leave = os.environ["RANK"], os._exit

    def told(code: int) -> None:
        (run / f"code-{rank}").write_text(str(code))
        leave(code)

    os._exit = told  # type: ignore[assignment]
    sys.stderr = (run / f"stderr-{rank}").open("w")
    init_process_group(torch.device("cpu"))
    group, store = control_group(60), Store(str(run / "checkpoints"), str(run))
    mark = Mark(lambda: "forward" if rank == "0" else "input")
    limits = Limits(2.0, dict.fromkeys(UPDATE.values(), 1.0) | {"set-up": 60.0})
    with watched(Watchdog(mark, run, store, limits, 25, int(rank), 2), group):
        mark.step = 5
        mark.at(None)
        if rank == "1":
            time.sleep(60)
        dist.barrier()


def test_hanging_rank_is_named_by_all(tmp_path: Path) -> None:
    """Although its own signs of life go on, and although the others are stuck in a collective."""
    with pytest.raises(ranks.RankError, match="died without a word"):
        ranks.run(hang, 2, tmp_path)
    facts = json.loads((tmp_path / STOPPED).read_text())
    assert re.fullmatch(
        r"rank 1 \(host .*, pid \d+\) hangs in waiting for a batch of step 5 \(epoch 1\), for [12] s; "
        r"rank 0 is in forward of step 5 \(epoch 1\)",
        facts["reason"],
    )
    assert facts["step"] == 4
    assert endings(tmp_path) == [
        ("75", f"error (rank {rank}): {facts['reason']}; there is no checkpoint yet: run it again\n") for rank in (0, 1)
    ]


def leave_early(run: Path) -> str:
    """Rank 1 ends by an error of its own, rank 0 meets the collective that fails."""
    import torch
    import torch.distributed as dist

    from genatt_dist.training.checkpoint.store import Store
    from genatt_dist.training.engine import init_process_group
    from genatt_dist.training.mark import Mark
    from genatt_dist.training.signs import Limits
    from genatt_dist.training.stopping import control_group
    from genatt_dist.training.watchdog import Watchdog, watched

    init_process_group(torch.device("cpu"))
    rank, group = dist.get_rank(), control_group(60)
    watchdog = Watchdog(
        Mark(), run, Store(str(run / "checkpoints"), str(run)), Limits.of(30, 60, 60), 25, rank, dist.get_world_size()
    )
    try:
        with watched(watchdog, group):
            if rank == 1:
                raise GenattError("the disk is full: free some space")
            dist.barrier()
    except GenattError as error:
        return f"{error.exit_code} {error}"
    return "no error"


def test_rank_that_said_why_it_ends_is_not_lost(tmp_path: Path) -> None:
    first, second = ranks.run(leave_early, 2, tmp_path)
    assert second == "2 the disk is full: free some space"
    assert first == ("1 rank 1 ended (error: GenattError: the disk is full: free some space) in step 1 or before")
    assert not (tmp_path / STOPPED).exists()
