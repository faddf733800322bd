"""A checkpoint goes on under any number of ranks as the run would have that wrote it, and after its data grew.

The runs are real ones with noise on. Every step's loss is compared, and every rank tells which windows it trained.
The whole matrix is `exhaustive`; with RESUME_RESULTS=FILE it leaves its figures there.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ranks
import torch
from tiny_data import write_prepared

from data_pipeline.errors import GenattError
from data_pipeline.format import load_manifest, manifest_hash
from genatt_dist import config as configuration
from genatt_dist import runs
from genatt_dist.config import RunConfig
from genatt_dist.data.batches import TrainingBatches
from genatt_dist.data.sequences import Sequences
from genatt_dist.embedding.table import TableShard, initial_rows
from genatt_dist.training.checkpoint.store import Store

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

SAVED, STOP = 20, 40
TOLERANCE = 1e-5
WORLDS = (1, 2, 3, 4)
_KINDS = {
    "sharded": ("table.learning_rate=0.05",),
    "replicated": ("table.kind=replicated", "loss.kind=full", "training.weight_decay=0.01"),
}
_COMMON = (
    "model.attention={type: diffusion, rank: 4, latent_size: 6, generator_size: 12, diffusion_steps: 6}",
    "model.dropout=0",
    "training={epochs: 6, evaluate_every: 9, optimizer: adamw, learning_rate: 0.005, batch_sequences: 24}",
    f"training.checkpoint_every={SAVED}",
)
# (kind, ranks before, ranks after): growing and shrinking, even and odd, to one and from one.
REPRESENTATIVE = [
    ("sharded", 2, 1),
    ("sharded", 2, 3),
    ("sharded", 3, 2),
    ("sharded", 3, 4),
    ("replicated", 1, 2),
    ("replicated", 1, 4),
    ("replicated", 4, 1),
    ("replicated", 4, 3),
]


class _StoppedError(Exception):
    pass


@dataclass(frozen=True)
class Trained:
    """losses: of every update by its step. windows: (step, epoch, window) of all ranks, as often as trained."""

    losses: dict[int, float]
    windows: list[tuple[int, int, int]]


def train_to(run: Path, resume: bool, stop: int, every: bool) -> tuple[dict[int, float], list[tuple[int, int, int]]]:
    """One rank of a run up to update `stop`: losses (rank 0's record of all ranks') and its own windows."""
    from genatt_dist.training import telemetry, trainer, update_log
    from genatt_dist.training import train as entry

    if every:
        ranks.partition_every_parameter()
    update_log._LOG_STEPS = 1
    losses: dict[int, float] = {}
    windows: list[tuple[int, int, int]] = []
    record, update = telemetry.Telemetry.record, trainer.Trainer.update

    def told(self: telemetry.Telemetry, kind: str, step: int, values: dict[str, float]) -> None:
        record(self, kind, step, values)
        if kind == "train":
            losses[step] = values["loss"] + values["generative_loss"]
        if step == stop:
            raise _StoppedError

    def seen(self: trainer.Trainer, batches: list[Any], rate: float) -> Any:
        step, epoch = self._progress.step + 1, self._progress.epoch
        windows.extend((step, epoch, int(window)) for batch in batches for window in batch.window_B)
        return update(self, batches, rate)

    telemetry.Telemetry.record = told  # type: ignore[method-assign]
    trainer.Trainer.update = seen  # type: ignore[method-assign]
    with contextlib.suppress(_StoppedError):
        entry.train(runs.read_config(run), run, "test", resume)
    return losses, windows


def trained(run: Path, config: RunConfig, world_size: int, resume: bool = False, stop: int = STOP) -> Trained:
    run.mkdir(parents=True, exist_ok=True)
    (run / runs.CONFIG).write_text(configuration.dump(config.model_copy(update={"world_size": world_size})))
    told = ranks.run(train_to, world_size, run, resume, stop, config.training.zero_stage == 3, seconds=200)
    return Trained(told[0][0], [window for _, windows in told for window in windows])


def take_over(before: Path, run: Path, step: int = SAVED) -> None:
    """A run directory with nothing but one checkpoint of another run."""
    shutil.copytree(before / "checkpoints" / f"step-{step:08d}", run / "checkpoints" / f"step-{step:08d}")


@pytest.fixture(scope="module")
def uninterrupted(
    make_config: Callable[..., RunConfig], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., tuple[RunConfig, Path, Trained]]:
    """The run of a kind of table on so many ranks that never stopped; each is trained once."""
    made: dict[tuple[Any, ...], tuple[RunConfig, Path, Trained]] = {}

    def make(kind: str, world_size: int, *overrides: str) -> tuple[RunConfig, Path, Trained]:
        key = (kind, world_size, *overrides)
        if key not in made:
            config = make_config(*_COMMON, *_KINDS[kind], *overrides)
            run = tmp_path_factory.mktemp(kind) / "whole"
            made[key] = config, run, trained(run, config, world_size)
            assert sorted(made[key][2].losses) == list(range(1, STOP + 1))
        return made[key]

    return make


def difference(
    uninterrupted: Callable[..., tuple[RunConfig, Path, Trained]],
    tmp_path: Path,
    kind: str,
    old: int,
    new: int,
    stages: tuple[int, int] = (1, 1),
    overrides: tuple[str, ...] = (),
) -> float:
    """Largest difference of the next 20 losses; every window of the epoch that was cut is trained once."""
    config, run, whole = uninterrupted(kind, old, f"training.zero_stage={stages[0]}", *overrides)
    take_over(run, tmp_path / "resumed")
    training = config.training.model_copy(update={"zero_stage": stages[1]})
    resumed = trained(tmp_path / "resumed", config.model_copy(update={"training": training}), new, resume=True)
    assert sorted(resumed.losses) == list(range(SAVED + 1, STOP + 1))
    batches = TrainingBatches.plan(Sequences.read(config.data.path), config.data, config.training)
    cut = SAVED // batches.num_batches
    assert SAVED % batches.num_batches > 0
    assert (cut + 1) * batches.num_batches <= STOP
    before = [told for told in whole.windows if told[0] <= SAVED]
    once = Counter(window for _, epoch, window in before + resumed.windows if epoch == cut)
    assert len(once) == batches.num_windows
    assert set(once.values()) == {1}
    return max(abs(resumed.losses[step] - whole.losses[step]) for step in resumed.losses)


@pytest.mark.parametrize(("kind", "before", "after"), REPRESENTATIVE)
def test_next_losses_are_those_of_the_run_that_never_stopped(
    uninterrupted: Callable[..., Any], tmp_path: Path, kind: str, before: int, after: int
) -> None:
    assert difference(uninterrupted, tmp_path, kind, before, after) <= TOLERANCE


# (kind, ranks, ranks, ZeRO stages, dropout): all ranks to all, every stage to every other, and keyed dropout.
WHOLE = [
    *((kind, old, new, (1, 1), 0.0) for kind in _KINDS for old in WORLDS for new in WORLDS),
    *((kind, 2, 3, (old, new), 0.0) for kind in _KINDS for old in range(4) for new in range(4) if old != new),
    *((kind, 2, 3, (1, 1), 0.2) for kind in _KINDS),
]


@pytest.fixture(scope="module")
def results() -> Iterator[list[dict[str, Any]]]:
    """Rows of the matrix, which RESUME_RESULTS asks to keep."""
    rows: list[dict[str, Any]] = []
    yield rows
    if path := os.environ.get("RESUME_RESULTS"):
        told = {"losses_compared": STOP - SAVED, "tolerance": TOLERANCE, "rows": rows}
        Path(path).write_text(json.dumps(told, indent=1) + "\n")


@pytest.mark.exhaustive
@pytest.mark.parametrize(("kind", "old", "new", "stages", "dropout"), WHOLE)
def test_whole_matrix_of_ranks_and_zero_stages(
    uninterrupted: Callable[..., Any],
    results: list[dict[str, Any]],
    tmp_path: Path,
    kind: str,
    old: int,
    new: int,
    stages: tuple[int, int],
    dropout: float,
) -> None:
    found = difference(uninterrupted, tmp_path, kind, old, new, stages, (f"model.dropout={dropout}",))
    results.append(
        {
            "table": kind,
            "ranks": [old, new],
            "zero_stages": list(stages),
            "dropout": dropout,
            "largest_loss_difference": found,
        }
    )
    assert found <= TOLERANCE


@pytest.mark.parametrize(("before", "after"), [("replicated", "sharded"), ("sharded", "replicated")])
def test_other_kind_of_table_takes_over_the_rows_alone(
    uninterrupted: Callable[..., Any], make_config: Callable[..., RunConfig], tmp_path: Path, before: str, after: str
) -> None:
    """And says so. The dense model goes on with its moments."""
    _, run, _ = uninterrupted(before, 1 if before == "replicated" else 2, "training.zero_stage=1")
    take_over(run, tmp_path)
    config = make_config(*_COMMON, *_KINDS[after], "loss.kind=sampled")
    (tmp_path / runs.CONFIG).write_text(configuration.dump(config))
    (notes, rows, state, moments), *_ = ranks.run_in_group(loaded_state, 2, tmp_path)
    assert len(notes) == 2
    assert "its rows are carried over, its optimizer state starts anew" in notes[1]
    stored = Store.of(tmp_path, config.training.checkpoint).newest()
    expected = TableShard("item", 0, 0, torch.empty(rows.shape), {})
    if before == "sharded":
        stored.read_shard(expected)
    else:
        expected.rows.copy_(stored.dense()["parameter.items.weight"])
    assert np.array_equal(rows, expected.rows)
    assert not state.any()
    assert moments
    assert all(np.array_equal(value, stored.dense()[name]) for name, value in moments.items())


def loaded_state(run: Path) -> Any:
    """What one rank says of a resumed run; all rows of the item table, their state, and moments of the rest (numpy)."""
    import torch.distributed as dist

    from genatt_dist.training.trainer import Trainer

    trainer = Trainer(run, runs.read_config(run), torch.device("cpu"), "test", resume=True)
    learner = trainer.learner
    dense = learner.engine.state()
    names = [name for name in dense if name.startswith("exp_avg") and not name.endswith("items.weight")]
    moments = {name: dense[name].numpy() for name in names}
    if learner.sharded is None:
        states = torch.stack([dense[f"{name}.items.weight"] for name in ("exp_avg", "exp_avg_sq")]).abs().sum(0)
        return trainer._notes, dense["parameter.items.weight"].numpy(), states.numpy(), moments
    parts: list[Any] = [None] * dist.get_world_size()
    shards = [(shard.rows.clone(), *map(torch.clone, shard.optimizer.values())) for shard in learner.sharded.shards]
    dist.all_gather_object(parts, shards)
    rows, state = (torch.cat(each) for each in zip(*(shard for part in parts for shard in part), strict=True))
    return trainer._notes, rows.numpy(), state.numpy(), moments


@pytest.fixture
def grown_set(tiny_set: Path, tmp_path: Path) -> Path:
    """A version that descends from the tiny set: users of new items joined, known items keep their ids."""
    import polars as pl

    old = load_manifest(str(tiny_set))
    lists: list[list[int]] = [[] for _ in range(old.num_users)]
    words = pl.read_parquet(tiny_set / old.vocabulary.path)
    original = dict(zip(words["dense_id"], words["item_id"], strict=True))
    for file in old.files:
        for user, items in pl.read_parquet(tiny_set / file.path).select("user_id", "item_ids").iter_rows():
            lists[user - 100] = [original[item] for item in items]
    rarest = int(words["count"].min())
    new = [[max(original.values()) + 1 + (user + place) % 7 for place in range(3)] for user in range(7)]
    assert rarest > 3
    path = tmp_path / "grown"
    manifest = write_prepared(path, [*lists, *new])
    manifest = manifest.model_copy(update={"parent": manifest_hash(str(tiny_set))})
    (path / "manifest.json").write_bytes(manifest.to_json())
    again = pl.read_parquet(path / manifest.vocabulary.path)
    assert again["item_id"][: old.num_items].to_list() == words["item_id"].to_list()
    assert manifest.num_items == old.num_items + 7
    return path


@pytest.mark.parametrize("kind", list(_KINDS))
def test_a_grown_vocabulary_adds_fresh_rows_and_keeps_all_state(
    uninterrupted: Callable[..., Any], grown_set: Path, tmp_path: Path, kind: str
) -> None:
    config, run, _ = uninterrupted(kind, 2 if kind == "sharded" else 1, "training.zero_stage=1")
    data = config.data.model_copy(update={"path": str(grown_set)})
    config = config.model_copy(update={"data": data, "world_size": 2})
    take_over(run, tmp_path / "loaded")
    (tmp_path / "loaded" / runs.CONFIG).write_text(configuration.dump(config))
    (notes, rows, state, _), *_ = ranks.run_in_group(loaded_state, 2, tmp_path / "loaded")
    assert len(notes) == 2
    assert "data grew to 207 items since the checkpoint" in notes[1]
    assert "epoch 2 begins with the new data" in notes[1]
    fresh = initial_rows(0, len(rows), rows.shape[1], config.table.init_std, config.training.seed).numpy()
    assert len(rows) == 208
    assert np.array_equal(rows[201:], fresh[201:])
    assert not np.array_equal(rows[1:201], fresh[1:201])
    assert not state[201:].any()
    assert state[1:201].any()

    losses = []
    for world_size in (1, 2):
        take_over(run, tmp_path / f"on-{world_size}")
        found = trained(tmp_path / f"on-{world_size}", config, world_size, resume=True, stop=SAVED + 5)
        assert {epoch for _, epoch, _ in found.windows} == {1}
        losses.append(list(found.losses.values()))
    assert losses[0] == pytest.approx(losses[1], abs=TOLERANCE)


def test_grown_data_are_accepted_before_a_process_starts_and_others_are_not(
    uninterrupted: Callable[..., Any],
    grown_set: Path,
    tmp_path: Path,
    write_set: Callable[[Path, int], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config, run, _ = uninterrupted("sharded", 2, "training.zero_stage=1")
    shutil.copytree(run, tmp_path / "run")
    started = []

    def launch(run: Path, *_: Any) -> None:
        started.append(runs.read_config(run).data.path)
        (run / runs.SUMMARY).write_text("{}")

    monkeypatch.setattr(runs, "launch", launch)

    def resume(path: Path, **training: Any) -> None:
        data = config.data.model_copy(update={"path": str(path)})
        changed = config.training.model_copy(update=training)
        runs.train(config.model_copy(update={"data": data, "training": changed}), tmp_path / "run", resume=True)

    hashes = r"manifest \w{12}… \(vocabulary \w{12}…\), .* has \w{12}… \(vocabulary \w{12}…\) and does not descend"
    with pytest.raises(GenattError, match=hashes):
        resume(write_set(tmp_path / "other", 3))
    with pytest.raises(GenattError, match=r"training\.epochs was 6, is 9; only"):
        resume(Path(config.data.path), epochs=9)

    def fail(*_: Any) -> None:
        raise GenattError("a rank refused")

    with monkeypatch.context() as failing:
        failing.setattr(runs, "launch", fail)
        with pytest.raises(GenattError, match="a rank refused"):
            resume(grown_set, epochs=9)
    assert runs.read_config(tmp_path / "run") == config.model_copy(update={"world_size": 2})  # still its checkpoints'
    resume(grown_set, epochs=9)
    assert started == [str(grown_set)]
