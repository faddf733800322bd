"""What a rank reserves of a Ray cluster, how many ranks have room there, and what their processes start with."""

from __future__ import annotations

import os

import ray

from genatt_dist.config import RunConfig
from genatt_dist.launch.environment import worker_environment


def resources_of_rank(config: RunConfig) -> dict[str, float]:
    """What a rank reserves."""
    gpus = config.ray.gpus_per_worker
    if gpus is None:
        gpus = float(ray.cluster_resources().get("GPU", 0) > 0)
    return {"CPU": config.ray.cpus_per_worker} | ({"GPU": gpus} if gpus else {})


def room(config: RunConfig, without: set[str]) -> int:
    """How many ranks the living nodes could hold, if nothing else ran there. without: ids of nodes not to count."""
    wanted = resources_of_rank(config)
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"] and node["NodeID"] not in without]
    return sum(min(int(node.get(name, 0) // amount) for name, amount in wanted.items()) for node in nodes)


def environment_of_rank(config: RunConfig, resources: dict[str, float]) -> dict[str, str]:
    """What a rank's process has to find when it starts: one thread for each CPU it reserves, and the allocator's
    settings. What the nodes have (credentials of storage, NCCL_…) it has anyway.
    """
    defaults = worker_environment({}, 1)
    ours = {name: os.environ.get(name, value) for name, value in defaults.items()}
    own = {
        "OMP_NUM_THREADS": str(max(1, int(config.ray.cpus_per_worker))),
        "DS_ACCELERATOR": "cuda" if resources.get("GPU") else "cpu",
        "TORCH_CPP_LOG_LEVEL": "ERROR",  # else its sockets print a C++ stack of every peer that is gone
    }
    return ours | own
