"""A real Ray exports a run's numbers where Prometheus looks for them."""

import os
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

_SECONDS = 60


@pytest.fixture
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    import ray

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(
        num_cpus=1,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        _system_config={"metrics_report_interval_ms": 1000},
    )
    yield ray.nodes()[0]
    ray.shutdown()


@pytest.mark.ray
@pytest.mark.exhaustive  # a Ray of its own settings, which no other test may have started before
def test_the_node_exports_the_loss_of_a_worker(node: dict[str, Any], tmp_path: Path) -> None:
    import ray

    class Worker:
        def train(self, run: Path) -> None:
            from genatt_dist.training.telemetry import Telemetry

            self.telemetry = Telemetry(run, "x", 10, active=True)  # lives as long as the worker
            self.telemetry.record("train", 5, {"loss": 2.5})

    worker = ray.remote(Worker).remote()
    ray.get(worker.train.remote(tmp_path), timeout=_SECONDS)
    address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    exported, deadline = list[str](), time.monotonic() + _SECONDS
    while len(exported) < 2 and time.monotonic() < deadline:
        time.sleep(0.5)
        with urllib.request.urlopen(address, timeout=5) as answer:
            lines = answer.read().decode().splitlines()
        exported = [line for line in lines if line.startswith(("ray_genatt_train_loss{", "ray_genatt_steps_total{"))]
    values = {line.partition("{")[0]: float(line.split()[-1]) for line in exported}
    assert values == {"ray_genatt_train_loss": 2.5, "ray_genatt_steps_total": 5.0}
    assert all(f'run="{tmp_path.name}"' in line and 'rank="0"' in line for line in exported)
