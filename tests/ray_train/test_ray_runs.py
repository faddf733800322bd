"""Runs under Ray Train end as if nothing had happened: with the losses of the other launchers, also after ranks were
killed, after a stop in order, and on fewer ranks.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import ranks
from recorded import losses, once_at, train_rank

from data_pipeline.errors import GenattError, ResumableError
from genatt_dist import run_storage
from genatt_dist.config import RunConfig
from genatt_dist.launch import ray_train
from genatt_dist.launch.options import RayOptions
from genatt_dist.training.checkpoint.store import Store

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.usefixtures("cluster"),
]


def _kill_youngest() -> None:
    found = [process for process in psutil.process_iter() if _title(process).startswith("ray::RayTrainWorker")]
    max(found, key=lambda process: process.create_time()).kill()


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def test_killed_then_stopped_then_resumed(
    make: Callable[..., RunConfig], reference: dict[int, float], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, run = make(), tmp_path / "run"
    half = max(reference) // 2
    with (
        pytest.raises(ResumableError, match="SIGTERM"),
        once_at(run, 5, _kill_youngest),
        once_at(run, half, lambda: os.kill(os.getpid(), signal.SIGTERM)),
    ):
        ray_train.fit(config, run, False)
    checkpoint = json.loads((run / "stopped.json").read_text())["checkpoint"]
    assert half <= max(losses(run)) < max(reference)
    told = capsys.readouterr().err
    assert "lost: starting again (1 of 3)" in told
    assert "note: goes on from the checkpoint of step " in told
    assert "Traceback" not in told
    summary = ray_train.fit(config, run, True)
    assert f"note: goes on from the checkpoint of step {checkpoint}\n" in capsys.readouterr().err
    assert summary["train"]["world_size"] == 2
    assert not (run / "stopped.json").exists()
    assert losses(run) == pytest.approx(reference, abs=1e-6)


@pytest.mark.exhaustive
def test_a_mistake_is_one_line_and_not_tried_again(
    make: Callable[..., RunConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(GenattError, match=r"loss is .*learning_rate") as caught:
        ray_train.fit(make(training={"learning_rate": 1e30}), tmp_path / "run", False)
    assert type(caught.value) is GenattError
    assert "\n" not in str(caught.value)
    told = capsys.readouterr().err
    assert "starting again" not in told
    assert "Traceback" not in told


@pytest.mark.exhaustive
def test_goes_on_with_fewer_ranks_where_there_is_no_room(
    make: Callable[..., RunConfig], reference: dict[int, float], tmp_path: Path
) -> None:
    config = make(3).model_copy(update={"ray": RayOptions(min_workers=1, gpus_per_worker=0)})
    summary = ray_train.fit(config, tmp_path / "run", None)
    assert summary["train"]["world_size"] == 2
    assert losses(tmp_path / "run") == pytest.approx(reference, abs=1e-6)


@pytest.mark.exhaustive
def test_a_run_at_a_url(make: Callable[..., RunConfig], reference: dict[int, float], tmp_path: Path) -> None:
    """Sharded table, so that every rank writes a part; killed once; the driver's copy is complete."""
    url, run = f"file://{tmp_path}/store/a", tmp_path / "copy"
    config = make(table={"kind": "sharded"})
    with once_at(tmp_path / "store" / "a", 5, _kill_youngest):
        summary = ray_train.fit(config, run, None, url)
    assert summary == json.loads((run / "summary.json").read_text())
    assert not (run / "checkpoints").exists()
    assert {"config.yaml", "environment.json", "metrics.jsonl", "summary.json"} <= set(run_storage.names(url))
    assert len(losses(run)) == len(reference)
    assert Store.of(run, run_storage.stored_at(config, url).training.checkpoint).complete()[-1] == len(reference)


@pytest.mark.exhaustive
def test_ray_data_feeds_two_ranks_what_the_loader_does(make: Callable[..., RunConfig], tmp_path: Path) -> None:
    """Ray deals rows in an order of its own, so an epoch is one global batch here: whoever got which of its rows, all
    losses are the loader's.
    """
    training = {"batch_sequences": 4096, "epochs": 6, "evaluate_every": 6, "checkpoint_every": None}
    runs = {}
    for feed in ("loader", "ray"):
        config = make(data={"feed": feed}, training=training, ray={"cpus_per_worker": 0.5})  # Ray Data takes a CPU
        if feed == "loader":
            (tmp_path / feed).mkdir()
            ranks.run(train_rank, 2, config, tmp_path / feed, seconds=120)
        else:
            summary = ray_train.fit(config, tmp_path / feed, False)
            assert summary["train"]["world_size"] == 2
        runs[feed] = losses(tmp_path / feed)
    assert list(runs["loader"]) == list(range(1, 7))
    assert runs["loader"][6] < runs["loader"][1]
    assert runs["ray"] == pytest.approx(runs["loader"], abs=1e-5)
