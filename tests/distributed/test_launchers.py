"""The same run under every launcher, from `runs.train` down to real workers, also when one of them dies."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from data_pipeline.errors import GenattError
from genatt_dist import config as configuration
from genatt_dist import runs
from genatt_dist.config import RunConfig

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

_VARIATIONAL = "model.attention={type: variational, rank: 4, latent_size: 6, generator_size: 12}"
_START_SECONDS, _END_SECONDS = 120, 60


@pytest.fixture(autouse=True)
def _on_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")


def _losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] + line["generative_loss"] for line in lines if line["kind"] == "train"]


def test_all_launchers_train_the_same(make_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    """One process, two ranks under torchrun, deepspeed, Slurm; dropout and latents are keyed, so they agree too."""
    adamw = ("training.optimizer=adamw", "training.learning_rate=0.005", "training.epochs=2", _VARIATIONAL)
    losses = {}
    for launcher, world_size in (("process", 1), ("torchrun", 2), ("deepspeed", 2)):
        config = make_config(*adamw, f"world_size={world_size}")
        summary = runs.train(config, tmp_path / launcher, launcher)
        assert summary["train"]["launcher"] == launcher
        assert summary["train"]["world_size"] == world_size
        losses[launcher] = _losses(tmp_path / launcher)
    losses["slurm"] = _under_slurm(config, tmp_path)
    assert len(losses["process"]) >= 2
    same = (("process", "torchrun", 1e-5), ("torchrun", "deepspeed", 1e-6), ("torchrun", "slurm", 1e-6))
    for left, right, tolerance in same:
        difference = max(abs(a - b) for a, b in zip(losses[left], losses[right], strict=True))
        print(f"largest difference of losses, {left} and {right}: {difference:.1e}")
        assert difference <= tolerance


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
    run, errors = tmp_path / "run", []

    def train() -> None:
        try:
            runs.train(make_config("training.epochs=100000", "training.patience=100000"), run, launcher)
        except GenattError as error:
            errors.append(str(error))

    thread = threading.Thread(target=train)
    thread.start()
    try:
        deadline = time.monotonic() + _START_SECONDS
        while not (run / "metrics.jsonl").exists() or len(_losses(run)) < 3:
            assert thread.is_alive(), f"it did not start: {errors}"
            assert time.monotonic() < deadline, "it took too long to start"
            time.sleep(0.1)
        workers = list(_workers(run))
        victim = next(worker for worker in workers if worker.environ().get("RANK") == "1")
        victim.kill()
        killed = time.monotonic()
        thread.join(_END_SECONDS)
        assert not thread.is_alive()
        print(f"{launcher}: ended {time.monotonic() - killed:.1f} s after its rank 1 was killed")
    finally:
        left = list(_workers(run))
        for worker in left:
            worker.kill()
        thread.join(_END_SECONDS)
    assert not left
    assert len(errors) == 1
    assert str(run) in errors[0]
    assert "rank 1" in errors[0]


def _workers(run: Path) -> Iterator[psutil.Process]:
    """The ranks of `run` that are alive, also if their launcher is not (whose command line names `run` too)."""
    for process in psutil.process_iter():
        try:
            if str(run) in process.cmdline() and "RANK" in process.environ():
                yield process
        except psutil.Error:
            continue
