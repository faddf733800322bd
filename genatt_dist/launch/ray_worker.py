"""What Ray Train runs in each of its workers: one rank of a run, as the other launchers' worker is.

Ray has set the variables of a launcher and made the process group before; `train` ends the group. A rank may be
on a node that sees neither the driver's directories nor its files, so the configuration comes in memory.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from io import TextIOBase
from pathlib import Path
from typing import Any

import ray
import ray.train
import yaml
from ray.exceptions import GetTimeoutError, RayError
from ray.train.collective import broadcast_from_rank_zero
from ray.train.v2._internal.execution.context import get_train_context

from data_pipeline.errors import GenattError
from data_pipeline.filesystems import explaining, filesystem
from data_pipeline.redaction import redact
from data_pipeline.storage import write_bytes
from genatt_dist import config as configuration
from genatt_dist import run_storage
from genatt_dist.config import RunConfig

SEEN_SECONDS = 30.0  # until a file that rank 0 wrote is seen by all, on NFS too
_SAY_SECONDS = 5.0
_DRAIN_SECONDS = 1.0  # between looks at what Ray says of its nodes


@dataclass(frozen=True)
class Task:
    """What the driver asks of every rank.

    config   of the run, as YAML
    run      its directory, as the driver calls it
    storage  the URL it is mirrored to, if it has one: then each node has a directory of its own
    control  the actor of `ray_control.Control`
    """

    config: str
    run: str
    storage: str | None
    control: Any


def rank_loop(arguments: dict[str, Any]) -> None:
    """Train as this rank, from the newest complete checkpoint, if there is one. Raises GenattError.

    arguments: `task`, a `Task`.
    """
    task: Task = arguments["task"]
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    place = f"{socket.gethostname()}, node {ray.util.get_node_ip_address()}, process {os.getpid()}"
    ray.get(task.control.entered.remote(rank, place))
    with ExitStack() as stack:
        stack.callback(lambda: ray.get(task.control.left.remote(rank)))
        stack.enter_context(_heard_by(task.control))
        _listen(task.control)
        tree = yaml.safe_load(task.config)
        config = configuration.parse(tree, "of the run").model_copy(update={"world_size": world_size})
        _train(task, config, rank, place, stack)


def _train(task: Task, config: RunConfig, rank: int, place: str, stack: ExitStack) -> None:
    from genatt_dist.launch.worker import quiet
    from genatt_dist.training.checkpoint.store import Store
    from genatt_dist.training.train import train

    quiet()
    logging.getLogger().setLevel(logging.WARNING)  # Ray Train has set it to INFO, also for the libraries
    run = Path(task.run)
    if task.storage:
        run = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="genatt-"))) / run.name
        run.mkdir()
        if rank == 0:
            run_storage.fetch(task.storage, run)
            stack.enter_context(run_storage.mirrored(task.storage, run))
    elif not run.is_dir():
        raise GenattError(
            f"run directory {run} is not there on the node of rank {rank} ({place}): put it on a file system that all "
            "nodes see, or give a URL (s3://…) as --run"
        )
    if rank == 0:
        (run / "stopped.json").unlink(missing_ok=True)  # of ranks that were lost before
    store = Store.of(run, config.training.checkpoint)
    _seen_by_all(store.root, rank, place)
    resume = broadcast_from_rank_zero(bool(store.complete()) if rank == 0 else None)
    try:
        train(config, run, "ray", bool(resume), _feed if config.data.feed == "ray" else None)
    except GenattError as error:
        if not task.storage:
            raise
        raise type(error)(str(error).replace(str(run), task.storage.rstrip("/"))) from None


def _feed(plan: Any) -> Any:
    """This worker's shard of the data set that the driver gave Ray Train. Collective."""
    import torch.distributed as dist

    from genatt_dist.data.ray_feed import RayBatches, RayFeed, all_gathered

    group = None if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")  # what is exchanged is in memory
    return RayFeed(RayBatches(plan, all_gathered(group)), ray.train.get_dataset_shard("train"))


def _seen_by_all(root: str, rank: int, place: str) -> None:
    """Whether what one rank writes to the checkpoints' directory the others find there. Raises GenattError."""
    token = broadcast_from_rank_zero(_write_token(root) if rank == 0 else None)
    fs, path = filesystem(f"{root}/{token}")
    deadline = time.monotonic() + SEEN_SECONDS
    found = False
    while not found and time.monotonic() < deadline:
        fs.invalidate_cache()
        with explaining(root, "read"):
            found = fs.exists(path)
        if not found:
            time.sleep(0.2)
    missing = None if found else f"rank {rank} ({place})"
    ray.train.collective.barrier()
    if rank == 0:
        with suppress(FileNotFoundError), explaining(root, "write"):
            fs.rm(path)
    if missing:
        raise GenattError(
            f"checkpoints: what rank 0 writes to {redact(root)} is not seen by {missing}: put the run on a file system "
            "that all nodes see, give a URL (s3://…) as --run, or set training.checkpoint.path to one"
        )


def _write_token(root: str) -> str:
    token = f".seen-{secrets.token_hex(8)}"
    write_bytes(f"{root}/{token}", b"")
    return token


def _listen(control: Any) -> None:
    """Have this rank stop in order when the driver asks for it, or Ray takes a node away."""
    from genatt_dist.training import preemption

    def listen() -> None:
        asked, told = control.stopped.remote(), False
        while True:
            try:
                preemption.request(ray.get(asked, timeout=_DRAIN_SECONDS))
                return
            except GetTimeoutError:
                info = get_train_context().preemption_context.preemption_info  # public only as a collective
                if info and not told:
                    told = True
                    nodes = tuple(info.preempted_node_ids)
                    control.drained.remote(f"Ray takes away node {', '.join(node[:8] for node in nodes)}", nodes)
            except RayError:  # the driver has gone, or given up
                preemption.request("nobody waits for this run any more")
                return

    threading.Thread(target=listen, name="stop watch", daemon=True).start()


@contextmanager
def _heard_by(control: Any) -> Iterator[None]:
    """What this process prints to stderr is read by the user, in the driver's terminal or the job's log."""
    before = sys.stderr
    sys.stderr = _Lines(lambda line: ray.get(control.say.remote(line), timeout=_SAY_SECONDS))  # type: ignore[assignment]
    try:
        yield
    finally:
        sys.stderr = before


class _Lines(TextIOBase):
    """A text stream that hands whole lines on; where nobody listens they are dropped."""

    def __init__(self, send: Callable[[str], None]) -> None:
        self._send, self._rest = send, ""

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            if line.strip():
                with suppress(RayError):
                    self._send(line)
        return len(text)
