"""A cluster that loses a node with notice, or gets one more: the ranks stop in order and go on where there is room."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from recorded import losses, once_at

from data_pipeline.local_ray import ENVIRONMENT, local_ray
from genatt_dist.config import RunConfig
from genatt_dist.launch import ray_train
from genatt_dist.launch.options import RayOptions

pytestmark = [pytest.mark.ray, pytest.mark.exhaustive, pytest.mark.timeout(600)]

_OPTIONS = RayOptions(min_workers=1, gpus_per_worker=0, placement="SPREAD")


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A cluster of one node with a CPU; `add_node` starts others."""
    from ray.cluster_utils import Cluster

    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    node = {"num_cpus": 1, "object_store_memory": 150 << 20, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=node)
    try:
        monkeypatch.setenv("RAY_ADDRESS", cluster.address)
        yield cluster
    finally:
        cluster.shutdown()


def _add(cluster: Any) -> None:
    cluster.add_node(num_cpus=1, object_store_memory=150 << 20)


def _drain_second(address: str) -> None:
    import ray

    second = next(node["NodeID"] for node in ray.nodes() if not node["Resources"].get("node:__internal_head__"))
    why = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot", "--deadline-remaining-seconds", "60"]
    program = str(Path(sys.executable).with_name("ray"))
    command = [program, "drain-node", "--address", address, "--node-id", second, *why]
    subprocess.run(command, check=True, capture_output=True, timeout=60)


def test_a_node_taken_away_with_notice(
    make: Callable[..., RunConfig],
    reference: dict[int, float],
    nodes: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _add(nodes)
    config, run = make().model_copy(update={"ray": _OPTIONS}), tmp_path / "run"
    with once_at(run, 5, lambda: _drain_second(nodes.address)):
        summary = ray_train.fit(config, run, False)
    told = capsys.readouterr().err
    assert "Ray takes away node" in told
    assert "going on with up to 1 ranks elsewhere" in told
    assert "starting again" not in told
    assert summary["train"]["world_size"] == 1
    assert losses(run) == pytest.approx(reference, abs=1e-5)


def test_a_node_more(
    make: Callable[..., RunConfig],
    nodes: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It is used without a step lost: the ranks write a checkpoint before Ray Train starts more of them."""
    monkeypatch.setattr(ray_train, "_RESIZE_SECONDS", 2.0)
    training = {"epochs": 9999, "max_seconds": 40, "evaluate_every": 9999, "checkpoint_every": None}
    config, run = make(training=training).model_copy(update={"ray": _OPTIONS}), tmp_path / "run"
    with local_ray(None), ThreadPoolExecutor(1) as thread:  # nodes can be added in the main thread only
        fitted = thread.submit(ray_train.fit, config, run, False)
        while not losses(run):
            time.sleep(0.1)
            assert not fitted.done()
        _add(nodes)
        summary = fitted.result(400)
    told = capsys.readouterr().err
    assert "the cluster has room for 2 ranks now: going on with them" in told
    assert summary["train"]["world_size"] == 2
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps)
