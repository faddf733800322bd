"""The benchmark's workers as processes of Ray actors, one bundle of a placement group a rank."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from data_pipeline.errors import GenattError
from data_pipeline.ray_address import ray_address
from data_pipeline.redaction import one_line
from data_pipeline.signals import own_sigterm

_ROOT = Path(__file__).parents[2]
_READY_SECONDS, _ANSWER_SECONDS = 300.0, 60.0  # a node may have to fetch the program first
_LINE_SECONDS = 10.0


class _Place:
    """Starts one worker where Ray has put it, as a process of its own: rows are forked, and actors have threads."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def address(self) -> tuple[str, int]:
        """This node's, and a port that is free on it."""
        import ray

        from genatt_dist.launch.network import free_port

        return ray.util.get_node_ip_address(), free_port()

    def start(self, module: str, environment: dict[str, str]) -> None:
        from genatt_dist.launch.environment import worker_environment

        base = dict(os.environ) | environment
        # What the actor imports, the worker does too, wherever Ray has unpacked the job's working directory.
        base["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
        command = [sys.executable, "-m", module]
        self._process = subprocess.Popen(command, env=worker_environment(base, 1))

    def stop(self) -> None:
        if self._process is not None:
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(10)
            self._process.kill()
            self._process.wait()


@contextmanager
def connected() -> Iterator[str]:
    """This node's address, inside the Ray that this process is connected to, or RAY_ADDRESS's, joined here and left
    again. No other one that may run on this machine: it is somebody else's.

    Raises GenattError where there is none.
    """
    import ray

    joined = not ray.is_initialized()
    if joined:
        if not (address := ray_address()):
            raise GenattError(
                "launcher=ray: RAY_ADDRESS is not set: set it to the cluster's address, or submit the benchmark as a "
                "job (`genatt submit benchmark`)"
            )
        try:
            # Nodes that did not start this program get its packages.
            packages = [str(_ROOT / name) for name in ("benchmarks", "data_pipeline", "genatt_dist")]
            environment = {"py_modules": packages, "excludes": ["results", "*.png"]}
            with own_sigterm():
                ray.init(address, runtime_env=environment, log_to_driver=bool(os.environ.get("BENCHMARK_STDERR")))
        except Exception as error:  # Ray raises half a dozen kinds
            raise GenattError(
                f"launcher=ray: cannot connect to RAY_ADDRESS={address}: {one_line(error)}: see whether it runs"
            ) from error
    try:
        yield str(ray.util.get_node_ip_address())
    finally:
        if joined:
            ray.shutdown()


@contextmanager
def start(module: str, ranks: int, environment: dict[str, str], seconds: float) -> Iterator[None]:
    """`ranks` processes of `module` with a launcher's variables, inside the Ray that this process is connected to.

    Raises GenattError where Ray has no room for them within so many seconds.
    """
    import ray
    from ray.exceptions import GetTimeoutError
    from ray.util.placement_group import placement_group, remove_placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    gpus = 1 if ray.cluster_resources().get("GPU", 0) >= ranks else 0
    group = placement_group([{"CPU": 1, **({"GPU": 1} if gpus else {})}] * ranks, strategy="PACK")
    places: list[Any] = []
    try:
        _wait_for_room(group, ranks, gpus, seconds)
        for rank in range(ranks):
            where = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=rank)
            options = {"num_cpus": 1, "num_gpus": gpus, "scheduling_strategy": where}
            places.append(ray.remote(_Place).options(**options).remote())
        try:
            addresses = ray.get([place.address.remote() for place in places], timeout=_READY_SECONDS)
        except GetTimeoutError:
            raise GenattError(
                f"launcher=ray: not all of {ranks} ranks answered in {_READY_SECONDS:.0f} s: see `ray status` and the "
                "logs of the nodes"
            ) from None
        nodes = [address for address, _ in addresses]
        master, port = addresses[0]
        for rank, place in enumerate(places):
            own = {
                "RANK": rank,
                "WORLD_SIZE": ranks,
                "LOCAL_RANK": nodes[:rank].count(nodes[rank]),
                "LOCAL_WORLD_SIZE": nodes.count(nodes[rank]),
                "MASTER_ADDR": master,
                "MASTER_PORT": port,
                "DS_ACCELERATOR": "cuda" if gpus else "cpu",
            }
            variables = environment | {name: str(value) for name, value in own.items()}
            ray.get(place.start.remote(module, variables), timeout=_ANSWER_SECONDS)
        yield
    finally:
        with suppress(Exception):  # an actor that is gone has no process left
            ray.get([place.stop.remote() for place in places], timeout=_ANSWER_SECONDS)
        for place in places:
            ray.kill(place)
        remove_placement_group(group)


def _wait_for_room(group: Any, ranks: int, gpus: int, seconds: float) -> None:
    """Until Ray has reserved the bundles; a line now and then says what it waits for."""
    wanted = f"{ranks} ranks of 1 CPU{' and 1 GPU' if gpus else ''} each"
    deadline = time.monotonic() + seconds
    while not group.wait(max(0.0, min(_LINE_SECONDS, deadline - time.monotonic()))):
        if time.monotonic() >= deadline:
            raise GenattError(
                f"Ray had no room for {wanted} in {seconds:.0f} s; the cluster has {_free()} free: end other jobs, add "
                "nodes, give fewer --ranks, or raise --start-seconds"
            )
        print(f"waiting for room for {wanted}; the cluster has {_free()} free", file=sys.stderr, flush=True)


def _free() -> str:
    """What all nodes together have left."""
    import ray

    left = ray.available_resources()
    return ", ".join(f"{left.get(name, 0):g} {name}" for name in ("CPU", "GPU") if name == "CPU" or name in left)
