"""What cluster/kuberay relies on: SIGTERM of `ray start --block` is Ray's notice of preemption, and the node waits for
its work within RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S.
"""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster_files import ROOT

sys.path.append(str(ROOT / "tests" / "jobs"))
from ray_cluster import HEAD, SECOND, Cluster

DRAIN_SECONDS = 20


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    nodes = Cluster({"RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": str(DRAIN_SECONDS)})
    try:
        nodes.start()
        yield nodes
    finally:
        nodes.end()


@pytest.mark.ray
@pytest.mark.exhaustive
def test_a_node_that_gets_sigterm_drains_and_ends_when_its_work_has_left(cluster: Cluster) -> None:
    script = Path(__file__).with_name("draining.py")
    words = [f"{HEAD}:{cluster._port}", SECOND, str(cluster._nodes[SECOND].pid), str(DRAIN_SECONDS)]
    driver = subprocess.run(
        [sys.executable, script, *words],
        env=cluster._of_nodes(),  # in a process of its own: it carries the cluster's token
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert driver.returncode == 0, driver.stderr[-3000:]
