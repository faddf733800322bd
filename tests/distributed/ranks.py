"""Runs a function in several processes that can form a process group, and brings back what each rank returned.

The processes are forked from a server that has imported torch, torchrec and deepspeed once (5 to 8 seconds); a rank
then costs hundredths of a second, and every call gets fresh ones: no state of a library is left over, and a rank that
hangs can be killed.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

_PRELOAD = [
    "pytest",
    "pyarrow.dataset",
    "deepspeed",
    "deepspeed.runtime.zero.muon.muon_optimizer",  # imported with any ZeRO optimizer, and with it torch's compiler
    "genatt_dist.embedding.sharded",
    "genatt_dist.training.train",
]
# What libraries read when they are imported: one thread a rank, and the CPU also where there is a GPU.
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
# After one rank failed, the others' errors are often the better explanation, or they hang: they get this long.
_GRACE_SECONDS = 2.0


class RankError(AssertionError):
    """What went wrong in which rank."""


def run(function: Callable[..., Any], world_size: int, *arguments: Any, seconds: float = 60) -> list[Any]:
    """function(*arguments) on every rank with the variables of a launcher set: its results by rank.

    Raises RankError with the ranks' tracebacks, or naming those that did not end within `seconds`; no process is left.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    before = {name: os.environ.get(name) for name in _ENVIRONMENT}
    os.environ.update(_ENVIRONMENT)
    port, ranks, results = _free_port(), [], {}
    try:
        for rank in range(world_size):
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(
                target=_rank, args=(sender, rank, world_size, port, function, arguments), daemon=True
            )
            process.start()
            sender.close()
            ranks.append((process, receiver))
        results = _collect([receiver for _, receiver in ranks], time.monotonic() + seconds)
    finally:
        for process, _ in ranks:
            process.kill() if len(results) < world_size else None
            process.join()
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
    failures = [f"rank {rank}: {text}" for rank, (ok, text) in sorted(results.items()) if not ok]
    failures += [f"rank {rank}: no answer" for rank in range(world_size) if rank not in results]
    if failures:
        raise RankError(f"{function.__name__} on {world_size} ranks, {seconds:.0f} s:\n" + "\n".join(failures))
    return [results[rank][1] for rank in range(world_size)]


def run_in_group(function: Callable[..., Any], world_size: int, *arguments: Any, seconds: float = 60) -> list[Any]:
    """`run`, inside a process group that the product made."""
    return run(_grouped, world_size, function, *arguments, seconds=seconds)


def partition_every_parameter() -> None:
    """Make ZeRO-3 take every parameter apart, in this process.

    It keeps those below 100,000 elements whole, which is all of a model of test size: ZeRO-3 would not be tested.
    """
    import deepspeed

    initialize = deepspeed.initialize

    def patched(*, config: dict[str, Any], **others: Any) -> Any:
        zero = config["zero_optimization"] | {"stage3_param_persistence_threshold": 0}
        return initialize(config=config | {"zero_optimization": zero}, **others)

    deepspeed.initialize = patched


def _collect(receivers: list[Connection], deadline: float) -> dict[int, tuple[bool, Any]]:
    """(succeeded, result or traceback) by rank, of the ranks that answered in time."""
    results: dict[int, tuple[bool, Any]] = {}
    while len(results) < len(receivers):
        open_ = [receiver for rank, receiver in enumerate(receivers) if rank not in results]
        ready = wait(open_, max(0.0, deadline - time.monotonic()))
        if not ready:
            break
        for receiver in ready:
            try:
                answer = receiver.recv()
            except EOFError:
                answer = (False, "the process died without a word")
            results[receivers.index(receiver)] = answer
            if not answer[0]:
                deadline = min(deadline, time.monotonic() + _GRACE_SECONDS)
    return results


def _rank(
    sender: Connection, rank: int, world_size: int, port: int, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    address = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_ADDR": "127.0.0.1"}
    os.environ.update({name: str(value) for name, value in (address | {"MASTER_PORT": port}).items()})
    try:
        answer = (True, function(*arguments))
    except BaseException:
        answer = (False, traceback.format_exc())
    sender.send(answer)


def _grouped(function: Callable[..., Any], *arguments: Any) -> Any:
    import torch
    import torch.distributed as dist

    from genatt_dist.training.engine import init_process_group

    init_process_group(torch.device("cpu"))
    try:
        return function(*arguments)
    finally:
        dist.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
