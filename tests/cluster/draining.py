"""A driver on a cluster of two nodes: `python draining.py ADDRESS HOST PID SECONDS` ends with 0 where SIGTERM of PID,
HOST's `ray start`, drains that node with that deadline, and the node ends when its work has left, not before.
"""

import os
import signal
import sys
import time

import psutil
import ray
from ray._private.state import state


@ray.remote(num_cpus=1)
class Rank:
    """What keeps a node busy."""

    def node(self) -> str:
        return str(ray.get_runtime_context().get_node_id())


def main(address: str, host: str, pid: int, seconds: float) -> None:
    ray.init(address=address, logging_level="ERROR")
    ranks = [Rank.remote() for _ in range(2)]
    places = ray.get([rank.node.remote() for rank in ranks], timeout=120)
    (here,) = (node["NodeID"] for node in ray.nodes() if node["NodeManagerAddress"] == host)
    rank, process = ranks[places.index(here)], psutil.Process(pid)
    os.kill(pid, signal.SIGTERM)
    noticed = time.monotonic()
    while not (draining := state.get_draining_nodes()):
        assert time.monotonic() < noticed + 10, "no notice"
        time.sleep(0.1)
    assert list(draining) == [here]
    assert seconds - 10 < draining[here] / 1000 - time.time() <= seconds
    time.sleep(3)
    assert process.status() != psutil.STATUS_ZOMBIE, "it did not wait"
    assert ray.get(rank.node.remote(), timeout=10) == here
    ray.kill(rank)
    while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < noticed + seconds, "it waited for nothing"
        time.sleep(0.1)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4]))
