"""What is started again after a failure, what ends the run, and how the user reads it; without a cluster."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError
from tiny_data import run_config

from data_pipeline.errors import GenattError, ResumableError
from genatt_dist import runs
from genatt_dist.launch import ray_control, ray_room, ray_train
from genatt_dist.launch.options import RayOptions
from genatt_dist.launch.ray_control import Control, SaveFirst, Verdict, describe

LOST = WorkerHealthCheckFailedError("a worker health check failed", ActorDiedError())
PEER = RuntimeError("Connection closed by peer [127.0.0.1]:1234")


class _Actor:
    """`Control` called as Ray calls it, in this process."""

    def __init__(self) -> None:
        self.control = Control()

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=lambda *arguments: asyncio.run(getattr(self.control, name)(*arguments)))


@pytest.fixture
def actor(monkeypatch: pytest.MonkeyPatch) -> _Actor:
    monkeypatch.setattr(ray_control, "ask", lambda answer, seconds=0: answer)
    actor = _Actor()
    for rank in range(2):
        actor.entered.remote(rank, f"host{rank}, process {rank}")
    return actor


def test_a_lost_rank_is_told_with_its_place_and_is_no_end(actor: _Actor) -> None:
    verdict = Verdict(actor, 1)
    verdict.after_exception(None, {0: PEER, 1: LOST})
    assert actor.news.remote().lines == ("rank 1 (host1, process 1) lost: starting again (1 of 1)",)
    actor.entered.remote(0, "host0")
    verdict.after_exception(None, {0: LOST})
    assert actor.news.remote().lines == ()  # the last failure is the run's error


def test_a_mistake_ends_the_run_whoever_was_lost_by_it(actor: _Actor) -> None:
    with pytest.raises(GenattError, match=r"^no such file$") as caught:
        Verdict(actor, 3).after_exception(None, {0: PEER, 1: GenattError("no such file")})
    assert not isinstance(caught.value, ResumableError)


def test_a_stop_in_order_ends_the_run_and_a_rank_that_lost_its_peer_does_not(actor: _Actor) -> None:
    stopped = {0: ResumableError("stopped at step 7"), 1: ResumableError("stopped at step 7")}
    Verdict(actor, 3).after_exception(None, stopped)  # nobody asked for it: what the watchdog says of a lost rank
    assert len(actor.news.remote().lines) == 1
    actor.stop.remote("SIGTERM")
    with pytest.raises(ResumableError, match="stopped at step 7"):
        Verdict(actor, 3).after_exception(None, stopped)
    with pytest.raises(ResumableError, match="SIGTERM"):
        Verdict(actor, 3).after_exception(None, {0: LOST})


def test_ranks_save_before_a_new_number_of_them_starts(actor: _Actor, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(ray_control.time, "sleep", lambda _: (asked.append(actor.reason.remote()), leave())[0])

    def leave() -> None:
        actor.left.remote(0)
        actor.left.remote(1)

    SaveFirst(actor, 5).before_controller_execute_resize_decision(SimpleNamespace(num_workers=4))
    assert asked == ["the cluster has room for 4 ranks now"]
    assert actor.reason.remote() == ""
    SaveFirst(actor, 5).before_controller_execute_resize_decision(SimpleNamespace(num_workers=4))
    assert len(asked) == 1


def test_what_fit_raises_is_what_the_user_reads() -> None:
    config = run_config("-").model_copy(update={"ray": RayOptions(max_failures=2)})
    mistake = ray_train._plain(ControllerError(GenattError("loss is nan")), config)
    assert type(mistake) is GenattError
    assert str(mistake) == "loss is nan"
    lost = ray_train._plain(WorkerGroupError("…", {0: PEER, 1: LOST}), config)
    assert type(lost) is ResumableError
    assert "rank 1 lost, and ray.max_failures=2 new starts are used up" in str(lost)
    bug = WorkerGroupError("Traceback …", {0: TypeError("unhashable")})
    assert ray_train._plain(bug, config) is bug
    assert describe({0: TypeError("two\n  lines")}, {}) == "rank 0: TypeError: two lines"


def test_room_and_resources_of_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    node = {"Alive": True, "NodeID": "a", "Resources": {"CPU": 8.0, "GPU": 2.0}}
    others = [node | {"NodeID": "b", "Resources": {"CPU": 3.0, "GPU": 4.0}}, node | {"NodeID": "c", "Alive": False}]
    monkeypatch.setattr(ray_room.ray, "nodes", lambda: [node, *others])
    monkeypatch.setattr(ray_room.ray, "cluster_resources", lambda: {"CPU": 11.0, "GPU": 6.0})
    config = run_config("-").model_copy(update={"ray": RayOptions(cpus_per_worker=2)})
    resources = ray_room.resources_of_rank(config)
    assert resources == {"CPU": 2.0, "GPU": 1.0}
    assert ray_room.room(config, set()) == 3
    assert ray_room.room(config, {"a"}) == 1
    environment = ray_room.environment_of_rank(config, resources)
    assert (environment["OMP_NUM_THREADS"], environment["DS_ACCELERATOR"]) == ("2", "cuda")
    alone = config.model_copy(update={"ray": RayOptions(gpus_per_worker=0)})
    assert ray_room.room(alone, set()) == 11
    assert ray_room.environment_of_rank(alone, {"CPU": 1.0})["DS_ACCELERATOR"] == "cpu"


def test_ray_data_feeds_ray_train_only(tmp_path) -> None:
    config = run_config("-", data={"feed": "ray"})
    with pytest.raises(GenattError, match=r"data\.feed=ray with launcher=process: .*--launcher ray"):
        runs.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
