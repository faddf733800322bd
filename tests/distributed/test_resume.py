"""A run that was stopped and resumed is the run that never stopped: the same losses, rows, weights and optimizer state.

The runs are real ones (`training.train` on every rank) with keyed dropout and noise on, so a draw that hung on
a process, or a cursor that was off by one batch, would show.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import ranks
import torch

from data_pipeline.errors import GenattError
from data_pipeline.format import load_manifest
from genatt_dist import config as configuration
from genatt_dist import runs
from genatt_dist.config import RunConfig
from genatt_dist.embedding.table import ITEM_TABLE, TableShard
from genatt_dist.training.checkpoint.read import Checkpoint
from genatt_dist.training.checkpoint.store import Store

pytestmark = pytest.mark.distributed

_STOPPED_EPOCH = 2  # counted from 0: two epochs are complete when it begins
_RUNS = {
    "sharded": (
        "model.attention={type: diffusion, rank: 4, latent_size: 6, generator_size: 12, diffusion_steps: 6}",
        "training.zero_stage=1",
        "training.weight_decay=0.01",
        "table.learning_rate=0.05",
    ),
    "replicated": ("table.kind=replicated", "loss.kind=full", "training.zero_stage=2"),
}


class _StoppedError(Exception):
    pass


def train(run: Path, resume: bool = False, stop: bool = False, records: int = 1) -> None:
    """One rank of a run; `stop` fails it in the middle of an epoch, at that epoch's so many-th record."""
    from genatt_dist.training import telemetry
    from genatt_dist.training import train as entry

    ranks.partition_every_parameter()
    record = telemetry.Telemetry.record
    seen = 0

    def fail(self: telemetry.Telemetry, kind: str, step: int, values: dict[str, float]) -> None:
        nonlocal seen
        record(self, kind, step, values)
        seen += kind == "train" and values["epoch"] == _STOPPED_EPOCH
        if seen == records:
            raise _StoppedError

    if stop:
        telemetry.Telemetry.record = fail  # type: ignore[method-assign]
    try:
        entry.train(runs.read_config(run), run, "test", resume)
    except _StoppedError:
        assert stop


def told_error(run: Path, resume: bool = False) -> str:
    """What the GenattError says that ends one rank of a run."""
    try:
        train(run, resume)
    except GenattError as error:
        return str(error)
    return "no error"


def write_config(run: Path, config: RunConfig) -> Path:
    run.mkdir(parents=True, exist_ok=True)
    (run / runs.CONFIG).write_text(configuration.dump(config))
    return run


@pytest.fixture(scope="module", params=list(_RUNS))
def whole_and_stopped(
    request: pytest.FixtureRequest, make_config: Callable[..., RunConfig], tmp_path_factory: pytest.TempPathFactory
) -> tuple[RunConfig, Path, Path]:
    """A configuration, its run of three epochs, and its run that stopped in the third."""
    common = ("training.epochs=3", "training.optimizer=adamw", "training.learning_rate=0.005", "training.patience=9")
    config = make_config(*_RUNS[request.param], *common)
    folder = tmp_path_factory.mktemp(request.param)
    whole, stopped = write_config(folder / "whole", config), write_config(folder / "stopped", config)
    ranks.run(train, 2, whole)
    ranks.run(train, 2, stopped, False, True)
    assert max(_losses(stopped)) < max(_losses(whole))
    assert newest(stopped).progress.epoch == _STOPPED_EPOCH
    return config, whole, stopped


@pytest.mark.parametrize(
    ("world_size", "stage", "tolerance"),
    [(2, None, 1e-6), (1, None, 1e-5), (2, 3, 1e-5)],
    ids=["as before", "on one rank", "with ZeRO-3"],
)
def test_resumed_run_equals_the_run_that_never_stopped(
    whole_and_stopped: tuple[RunConfig, Path, Path],
    tmp_path: Path,
    world_size: int,
    stage: int | None,
    tolerance: float,
) -> None:
    config, whole, stopped = whole_and_stopped
    resumed = tmp_path / "resumed"
    shutil.copytree(stopped, resumed)
    training = config.training.model_copy(update={} if stage is None else {"zero_stage": stage})
    write_config(resumed, config.model_copy(update={"world_size": world_size, "training": training}))
    ranks.run(train, world_size, resumed, True)

    expected, found = _losses(whole), _losses(resumed)
    assert expected.keys() == found.keys()
    loss = max(abs(expected[step] - found[step]) for step in expected)
    num_rows = load_manifest(config.data.path).num_items + 1
    weights = _largest_difference(newest(whole), newest(resumed), num_rows)
    print(f"largest differences of losses {loss:.1e}, of weights and optimizer state {weights:.1e}")
    assert loss <= tolerance
    assert weights <= tolerance
    assert json.loads((whole / runs.SUMMARY).read_text())["valid"] == pytest.approx(
        json.loads((resumed / runs.SUMMARY).read_text())["valid"], abs=tolerance if world_size == 2 else 1e-2
    )


@pytest.mark.exhaustive
def test_run_resumed_inside_an_epoch_equals_the_run_that_never_stopped(
    make_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    """The cursor points into the epoch: no batch is trained twice or left out."""
    common = ("training.epochs=3", "training.optimizer=adamw", "training.learning_rate=0.005", "training.patience=9")
    # Every update is saved but an epoch's last, which validation saves: none twice.
    config = make_config(*_RUNS["sharded"], *common, "training.checkpoint_every=1")
    whole, stopped = write_config(tmp_path / "whole", config), write_config(tmp_path / "stopped", config)
    ranks.run(train, 2, whole)
    ranks.run(train, 2, stopped, False, True, 2)
    progress = newest(stopped).progress
    assert progress.epoch == _STOPPED_EPOCH
    assert progress.batch > 0
    ranks.run(train, 2, stopped, True)
    assert _losses(stopped) == pytest.approx(_losses(whole), abs=1e-6)
    num_rows = load_manifest(config.data.path).num_items + 1
    assert _largest_difference(newest(whole), newest(stopped), num_rows) <= 1e-6


@pytest.mark.exhaustive
def test_epoch_that_was_begun_is_ended_although_time_is_up(
    make_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    """Otherwise a run stopped before its first validation would resume to an empty summary."""
    common = ("training.epochs=4", "training.optimizer=adamw", "training.learning_rate=0.005", "training.patience=9")
    config = make_config(*_RUNS["replicated"], *common, "training.checkpoint_every=1")
    run = write_config(tmp_path / "run", config)
    ranks.run(train, 2, run, False, True, 2)
    late = config.training.model_copy(update={"max_seconds": 0.001})
    write_config(run, config.model_copy(update={"training": late}))
    ranks.run(train, 2, run, True)
    summary = json.loads((run / runs.SUMMARY).read_text())
    assert summary["train"]["epochs"] == _STOPPED_EPOCH + 1
    assert summary["valid"]


def test_bf16_trains_and_validates_with_a_replicated_table(
    make_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    """DeepSpeed casts the replicated rows, so ranking meets bf16 rows and float32 states."""
    bf16 = ("training.precision=bf16", "training.optimizer=adamw", "training.epochs=1")
    run = write_config(tmp_path / "run", make_config(*_RUNS["replicated"], *bf16))
    ranks.run(train, 2, run)
    valid = json.loads((run / runs.SUMMARY).read_text())["valid"]
    assert 0 < valid["ndcg@10"] <= 1


@pytest.fixture
def stopped_run(whole_and_stopped: tuple[RunConfig, Path, Path], tmp_path: Path) -> tuple[RunConfig, Path]:
    """A copy of the stopped run, to be damaged."""
    config, _, stopped = whole_and_stopped
    shutil.copytree(stopped, tmp_path / "run")
    return config, tmp_path / "run"


def test_corrupted_byte_of_a_checkpoint_is_named(stopped_run: tuple[RunConfig, Path]) -> None:
    """Before any process starts, and by the ranks too when they are started without that check."""
    config, run = stopped_run
    for path in sorted(Path(newest(run).path).iterdir()):
        if path.name == "COMPLETE":
            continue
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
        with pytest.raises(GenattError, match=rf"step-\d+: {path.name} has sha256"):
            runs.train(config, run, launcher="torchrun", resume=True)
        content[len(content) // 2] ^= 1
        path.write_bytes(content)


def test_resuming_with_other_data_is_refused(
    stopped_run: tuple[RunConfig, Path], tmp_path: Path, write_set: Callable[[Path, int], Path]
) -> None:
    """As large, with other sequences: only the manifest's hash tells."""
    config, run = stopped_run
    other = write_set(tmp_path / "other", 1)
    write_config(run, config.model_copy(update={"data": config.data.model_copy(update={"path": str(other)})}))
    for error in ranks.run(told_error, 2, run, True):
        assert "was trained on data with manifest" in error
        assert "does not descend from it: resume with the data it began with" in error


def test_unfinished_checkpoint_is_ignored(stopped_run: tuple[RunConfig, Path]) -> None:
    """A kill may come while a checkpoint is written."""
    _, run = stopped_run
    complete = newest(run)
    later = Path(complete.path).with_name("step-99999999")
    shutil.copytree(complete.path, later)
    (later / "COMPLETE").rename(later / "COMPLETE.tmp")
    assert newest(run).path == complete.path


def test_loss_that_is_no_number_stops_all_ranks_with_one_line(
    make_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    config = make_config("training.learning_rate=1e30", "training.epochs=2")
    errors = ranks.run(told_error, 2, write_config(tmp_path / "run", config), seconds=30)
    for error in errors:
        assert error.startswith("loss is")
        assert "lower training.learning_rate" in error
        assert "\n" not in error


def _losses(run: Path) -> dict[int, float]:
    """Both training losses added up, by step; a step that a stopped run had told before counts as told last."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] + line["generative_loss"] for line in lines if line["kind"] == "train"}


def newest(run: Path) -> Checkpoint:
    """The newest complete checkpoint of a run that keeps them in its directory."""
    return Store.of(run, runs.read_config(run).training.checkpoint).newest()


def _largest_difference(left: Checkpoint, right: Checkpoint, num_rows: int) -> float:
    """Over all tensors of two checkpoints: dense weights, moments, buffers, rows and their state."""
    ours, theirs = _tensors(left, num_rows), _tensors(right, num_rows)
    assert ours.keys() == theirs.keys()
    assert left.progress.step == right.progress.step
    return max(float(np.abs(ours[name] - theirs[name]).max()) for name in ours)


def _tensors(source: Checkpoint, num_rows: int) -> dict[str, np.ndarray]:
    tensors = {name: value.numpy() for name, value in source.dense().items()}
    if not source.rectangles:
        return tensors
    state = torch.full((num_rows,), torch.nan)
    whole = TableShard(ITEM_TABLE, 0, 0, torch.empty(num_rows, 16), {"momentum1": state})
    source.read_shard(whole)
    return tensors | {"table": whole.rows.numpy(), "momentum1": state.numpy()}
