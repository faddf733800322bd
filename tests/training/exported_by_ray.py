"""What a node of a Ray of its own exports of a worker's run: `python exported_by_ray.py RUN` prints it as JSON."""

from __future__ import annotations

import json
import sys
import time
import urllib.request
from pathlib import Path

import ray

SECONDS = 60
_WANTED = ("ray_genatt_train_loss{", "ray_genatt_steps_total{")


class _Worker:
    def train(self, run: Path) -> None:
        from genatt_dist.training.telemetry import Telemetry

        self.telemetry = Telemetry(run, "x", 10, active=True)  # lives as long as the worker
        self.telemetry.record("train", 5, {"loss": 2.5})


def exported(run: Path) -> list[str]:
    """Prometheus' lines about the run, once both are there."""
    ray.init(
        num_cpus=1,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        _system_config={"metrics_report_interval_ms": 1000},
    )
    node = ray.nodes()[0]
    address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    worker = ray.remote(_Worker).remote()
    ray.get(worker.train.remote(run), timeout=SECONDS)
    found, deadline = list[str](), time.monotonic() + SECONDS
    while len(found) < len(_WANTED) and time.monotonic() < deadline:
        time.sleep(0.5)
        with urllib.request.urlopen(address, timeout=5) as answer:
            found = [line for line in answer.read().decode().splitlines() if line.startswith(_WANTED)]
    ray.shutdown()
    return found


if __name__ == "__main__":
    print(json.dumps(exported(Path(sys.argv[1]))))
