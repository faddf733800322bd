"""What one process has to start of a run: which ranks, where the first one listens, who makes the run directory."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from data_pipeline.errors import GenattError
from genatt_dist.launch import slurm
from genatt_dist.launch.hosts import Host, Hosts, address_of, check, endpoint, read_hostfile
from genatt_dist.launch.meeting import Meeting, mark
from genatt_dist.launch.network import free_port, is_own

_LOOPBACK = "127.0.0.1"


@dataclass
class Place:
    """What this process starts.

    local_ranks: ranks on this host (of a hostfile: the most on any of its hosts); device: `cpu` or `cuda`, for all.
    first: whether it makes the run directory, which the others (same command, other host or task) wait for.
    master, port: where the first rank listens. machines: of a hostfile. task: what Slurm gave this one.
    """

    hosts: Hosts
    local_ranks: int
    device: str
    first: bool = True
    node_rank: int = 0
    master: str = _LOOPBACK
    port: int = 0
    machines: tuple[Host, ...] = ()
    task: dict[str, str] = field(default_factory=dict)
    meeting: Meeting | None = None
    token: str = ""

    @property
    def alone(self) -> bool:
        """Whether all ranks are on this host."""
        return self.master == _LOOPBACK

    def begin(self, run: Path) -> None:
        """The run directory is made: tell the others, or wait until the first one says so."""
        if self.meeting is None:
            self.token = mark(run) if self.machines else ""
        elif self.first:
            self.port = self.hosts.master_port or free_port()
            self.meeting.announce(run, self.port)
        else:
            self.port = self.meeting.hear(run, f"{socket.gethostname()} (place {self.node_rank})")


def device_type(local_ranks: int) -> str:
    """Where ranks started from here run: `cuda` where each has a GPU of its own, else `cpu`; DS_ACCELERATOR decides
    where it is set.
    """
    if chosen := os.environ.get("DS_ACCELERATOR"):
        return chosen
    import torch  # here, not above: `genatt --help` answers without it

    return "cuda" if torch.cuda.device_count() >= local_ranks else "cpu"


@contextmanager
def take(launcher: str, hosts: Hosts, world_size: int) -> Iterator[Place]:
    """This process's place, with every host of it found in order. What goes wrong before `begin` is told to the others.

    Raises GenattError: hosts that cannot be reached or do not come, slots or tasks that are not world_size.
    """
    hosts.check(launcher, world_size)
    if hosts.hostfile is not None:
        place = _of_hostfile(hosts.hostfile, hosts, world_size)
    elif launcher == "slurm":
        place = _of_task(hosts, world_size)
    elif hosts.rendezvous is not None:
        place = _of_node(*endpoint(hosts.rendezvous), hosts, world_size)
    else:
        place = Place(hosts, world_size, device_type(world_size), port=hosts.master_port or free_port())
    try:
        yield place
    except BaseException as error:
        if place.meeting is not None:
            place.meeting.refuse(str(error) if isinstance(error, GenattError) else "it was ended")
        raise


def _of_hostfile(path: Path, hosts: Hosts, world_size: int) -> Place:
    machines = read_hostfile(path, world_size)
    answers = check(machines, path, hosts.ssh_port)
    most = max(machine.slots for machine in machines)
    on_gpus = all(answer["gpus"] >= machine.slots for machine, answer in zip(machines, answers, strict=True))
    device = os.environ.get("DS_ACCELERATOR", "cuda" if on_gpus else "cpu")
    master = address_of(machines[0].name, hosts.ssh_port)
    return Place(hosts, most, device, master=master, port=hosts.master_port or answers[0]["port"], machines=machines)


def _of_task(hosts: Hosts, world_size: int) -> Place:
    task = slurm.task(os.environ, world_size)
    rank, master = int(task["RANK"]), task["MASTER_ADDR"]
    port = hosts.master_port or slurm.meeting_port()
    meeting = Meeting(master, port, rank == 0, world_size, rank, hosts.start_seconds)
    local = int(task["LOCAL_WORLD_SIZE"])
    one_gpu_each = os.environ.get("CUDA_VISIBLE_DEVICES", "").isdigit()
    device = device_type(1 if one_gpu_each else local)
    return Place(hosts, local, device, rank == 0, rank, master, task=task, meeting=meeting)


def _of_node(master: str, port: int, hosts: Hosts, world_size: int) -> Place:
    first = is_own(master) if hosts.node_rank is None else hosts.node_rank == 0
    meeting = Meeting(master, port, first, hosts.nodes, hosts.node_rank, hosts.start_seconds)
    local = world_size // hosts.nodes
    return Place(hosts, local, device_type(local), first, meeting.number, master, meeting=meeting)
