"""A real Ray exports a run's numbers where Prometheus looks for them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import exported_by_ray
import pytest


@pytest.mark.ray
@pytest.mark.slow
def test_the_node_exports_the_loss_of_a_worker(tmp_path: Path) -> None:
    # Ray takes an interval of its metrics only when it starts, and this process may have one already.
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    ended = subprocess.run(
        [sys.executable, exported_by_ray.__file__, str(tmp_path)],
        env=clean | {"RAY_USAGE_STATS_ENABLED": "0"},
        capture_output=True,
        text=True,
        timeout=4 * exported_by_ray.SECONDS,
    )
    assert ended.returncode == 0, ended.stderr
    lines = json.loads(ended.stdout)
    values = {line.partition("{")[0]: float(line.split()[-1]) for line in lines}
    assert values == {"ray_genatt_train_loss": 2.5, "ray_genatt_steps_total": 5.0}
    assert all(f'run="{tmp_path.name}"' in line and 'rank="0"' in line for line in lines)
