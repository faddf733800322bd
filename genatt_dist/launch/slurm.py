"""What Slurm tells a task of `srun` about its place, in the words that torch uses."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

from data_pipeline.errors import GenattError

_FIRST_PORT, _PORTS = 20_000, 12_000  # below the range from which systems give out ports


def task(environment: Mapping[str, str], world_size: int) -> dict[str, str]:
    """RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE and MASTER_ADDR of this task."""
    try:
        rank, tasks, local = (int(environment[f"SLURM_{name}"]) for name in ("PROCID", "NTASKS", "LOCALID"))
        node = int(environment.get("SLURM_NODEID", "0"))
        nodes = next(environment[name] for name in _NODE_LISTS if name in environment)
        per_node = environment.get("SLURM_STEP_TASKS_PER_NODE", environment.get("SLURM_TASKS_PER_NODE", str(tasks)))
        here = _counts(per_node)[node]
    except (KeyError, ValueError, IndexError, StopIteration):
        raise GenattError(
            "launcher=slurm outside a Slurm task (SLURM_PROCID, SLURM_NTASKS, SLURM_LOCALID, SLURM_NODELIST and what "
            "belongs to them are not all set): start it by `srun --ntasks=N genatt train … --launcher slurm`"
        ) from None
    if tasks != world_size:
        raise GenattError(
            f"SLURM_NTASKS={tasks}, but world_size={world_size}: use `srun --ntasks={world_size}`, or set "
            f"world_size={tasks}"
        )
    return {
        "RANK": str(rank),
        # Where Slurm binds a GPU to each task, every task sees its own as the only one.
        "LOCAL_RANK": "0" if environment.get("CUDA_VISIBLE_DEVICES", "").isdigit() else str(local),
        "WORLD_SIZE": str(tasks),
        "LOCAL_WORLD_SIZE": str(here),
        "MASTER_ADDR": first_host(nodes),
    }


_NODE_LISTS = ("SLURM_STEP_NODELIST", "SLURM_NODELIST", "SLURM_JOB_NODELIST")


def meeting_port(environment: Mapping[str, str] = os.environ) -> int:
    """A port that all tasks of a step agree on without a word, and that other jobs on the same host do not use."""
    job, step = environment.get("SLURM_JOB_ID", "0"), environment.get("SLURM_STEP_ID", "0")
    number = (int(job) if job.isdigit() else 0) * 7 + (int(step) if step.isdigit() else 0)
    return _FIRST_PORT + number % _PORTS


def first_host(nodes: str) -> str:
    """The first name of a list such as `gpu[03-05,9],login`."""
    first = re.split(r",(?![^\[]*\])", nodes)[0]
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first)


def _counts(per_node: str) -> list[int]:
    """Tasks of each node, from `2(x3),1`."""
    counts: list[int] = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", per_node):
        counts += [int(count)] * int(times or 1)
    return counts
