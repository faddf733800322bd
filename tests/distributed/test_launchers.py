"""The same run under every launcher, from `runs.train` down to real workers, also when one of them dies."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import psutil
import pytest
from fault_results import figures

from data_pipeline.errors import GenattError, ResumableError
from genatt_dist import config as configuration
from genatt_dist import runs
from genatt_dist.config import RunConfig
from genatt_dist.launch.ending import FAILED
from genatt_dist.training.checkpoint.store import Store
from genatt_dist.training.stopped import STOPPED

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

_VARIATIONAL = "model.attention={type: variational, rank: 4, latent_size: 6, generator_size: 12}"
_WITHOUT_END = ("training.epochs=100000", "training.patience=100000")
_START_SECONDS, _END_SECONDS = 120, 60


@pytest.fixture(autouse=True)
def _on_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")


def _losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] + line["generative_loss"] for line in lines if line["kind"] == "train"]


@pytest.mark.parametrize(
    "launchers",
    [
        pytest.param(("torchrun", "deepspeed"), id="programs"),
        pytest.param(("torchrun", "deepspeed", "ray"), id="all", marks=[pytest.mark.ray, pytest.mark.exhaustive]),
    ],
)
def test_all_launchers_train_the_same(
    make_config: Callable[..., RunConfig], tmp_path: Path, launchers: tuple[str, ...]
) -> None:
    """One process, two ranks under each of the others; dropout and latents are keyed, so they agree too.
    FAULT_RESULTS=FILE keeps the differences of `all`.
    """
    adamw = ("training.optimizer=adamw", "training.learning_rate=0.005", "training.epochs=2", _VARIATIONAL)
    losses = {}
    for launcher in ("process", *launchers):
        config = make_config(*adamw, f"world_size={1 if launcher == 'process' else 2}")
        summary = runs.train(config, tmp_path / launcher, launcher)
        assert summary["train"]["launcher"] == launcher
        assert summary["train"]["world_size"] == config.world_size
        losses[launcher] = _losses(tmp_path / launcher)
    losses["slurm"] = _under_slurm(config, tmp_path)
    assert len(losses["process"]) >= 2
    reference = losses.pop("torchrun")
    limits = {launcher: 1e-5 if launcher == "process" else 1e-6 for launcher in losses}
    with figures("launchers_losses" if "ray" in launchers else None) as found:
        found |= {"attention": "variational", "ranks": 2, "ranks_under_process": 1, "records": len(reference)}
        found |= {"largest_difference_from_torchrun": _differences(losses, reference), "limits": limits}
        assert all(found["largest_difference_from_torchrun"][name] <= limit for name, limit in limits.items()), found


def _differences(losses: dict[str, list[float]], reference: list[float]) -> dict[str, float]:
    """The largest of each launcher's."""
    return {launcher: max(abs(a - b) for a, b in zip(reference, losses[launcher], strict=True)) for launcher in losses}


def _under_slurm(config: RunConfig, directory: Path) -> list[float]:
    """The same command twice, as srun starts it; each learns its place from Slurm's variables."""
    path, run = directory / "slurm.yaml", directory / "slurm"
    path.write_text(configuration.dump(config))
    job = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_NTASKS": "2", "SLURM_NODELIST": "localhost", "SLURM_NODEID": "0"}
    tasks = [
        subprocess.Popen(
            [sys.executable, "-m", "genatt_dist.cli", "train", path, "--run", run, "--launcher", "slurm"],
            env=os.environ | job | {"SLURM_PROCID": str(task), "SLURM_LOCALID": str(task)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for task in (1, 0)
    ]
    try:
        printed = [task.communicate(timeout=_START_SECONDS)[0] for task in tasks]
    finally:
        for task in tasks:
            task.kill()
    assert [task.returncode for task in tasks] == [0, 0]
    assert printed[0] == ""  # the first task tells the result
    assert f"{run}: valid ndcg@10" in printed[1]
    assert json.loads((run / "summary.json").read_text())["train"]["launcher"] == "slurm"
    return _losses(run)


@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_dead_rank_ends_the_run(make_config: Callable[..., RunConfig], tmp_path: Path, launcher: str) -> None:
    """A killed rank (out of memory, say) leaves the others waiting in a collective; the run ends all the same."""
    run = tmp_path / "run"
    error = _ended_by(make_config(*_WITHOUT_END), run, launcher, lambda: len(_losses(run)) >= 3, (1,))
    assert isinstance(error, ResumableError)
    assert str(run) in str(error)
    assert "rank 1" in str(error)


_BY_HAND = pytest.mark.exhaustive


@pytest.mark.parametrize(
    ("launcher", "world_size"),
    [("process", 1), pytest.param("torchrun", 2, marks=_BY_HAND), pytest.param("deepspeed", 2, marks=_BY_HAND)],
)
def test_killed_ranks_leave_a_run_that_can_go_on(
    make_config: Callable[..., RunConfig], tmp_path: Path, launcher: str, world_size: int
) -> None:
    """All of them at once, so that none can say who was lost: it is no mistake of the user's all the same."""
    config = make_config(*_WITHOUT_END, "training.checkpoint_every=7", f"world_size={world_size}")
    run = tmp_path / "run"
    store = Store.of(run, config.training.checkpoint)
    error = _ended_by(config, run, launcher, lambda: len(store.complete()) > 1, range(world_size))
    assert isinstance(error, ResumableError)
    assert "its ranks ended without a word" in str(error)
    assert f"go on from the checkpoint of step {store.complete()[-1]} by the same command with --resume" in str(error)
    assert not (run / STOPPED).exists()
    assert not (run / FAILED).exists()


@pytest.mark.exhaustive
@pytest.mark.parametrize(("launcher", "world_size"), [("process", 1), ("torchrun", 2), ("deepspeed", 2)])
def test_a_mistake_is_none_that_can_go_on(
    make_config: Callable[..., RunConfig], tmp_path: Path, launcher: str, world_size: int
) -> None:
    config = make_config("training.learning_rate=1e30", f"world_size={world_size}")
    with pytest.raises(GenattError, match=f"ended with exit code 2 under launcher={launcher}") as caught:
        runs.train(config, tmp_path / "run", launcher)
    assert type(caught.value) is GenattError


def _ended_by(
    config: RunConfig, run: Path, launcher: str, ready: Callable[[], bool], victims: Iterable[int]
) -> GenattError:
    """What a run ends with whose ranks `victims` are killed once it is `ready`; nothing of it is left."""
    errors: list[GenattError] = []

    def train() -> None:
        try:
            runs.train(config, run, launcher)
        except GenattError as error:
            errors.append(error)

    thread = threading.Thread(target=train)
    thread.start()
    try:
        deadline = time.monotonic() + _START_SECONDS
        while not (run / "metrics.jsonl").exists() or not ready():
            assert thread.is_alive(), f"it did not start: {errors}"
            assert time.monotonic() < deadline, "it took too long to start"
            time.sleep(0.1)
        found = {int(worker.environ()["RANK"]): worker for worker in _workers(run)}
        for victim in victims:
            found[victim].kill()
        killed = time.monotonic()
        thread.join(_END_SECONDS)
        assert not thread.is_alive()
        print(f"{launcher}: ended {time.monotonic() - killed:.1f} s after the kill")
    finally:
        left = list(_workers(run))
        for worker in left:
            worker.kill()
        thread.join(_END_SECONDS)
    assert not left
    (error,) = errors
    return error


def _workers(run: Path) -> Iterator[psutil.Process]:
    """The ranks of `run` that are alive, also if their launcher is not (whose command line names `run` too)."""
    for process in psutil.process_iter():
        try:
            if str(run) in process.cmdline() and "RANK" in process.environ():
                yield process
        except psutil.Error:
            continue
