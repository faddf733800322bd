"""Which hosts a run is to use, as the user says it: none but this one, those of a hostfile, or those on which the same
command was given.

`check` looks at the hosts of a file before anything is started on them, each within a time limit.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.errors import GenattError
from genatt_dist.launch.network import is_loopback_name
from genatt_dist.launch.probe import installed

# `ssh` starts the deepspeed launcher on every host by OpenSSH alone; the others are the deepspeed launcher's own.
REMOTE_SHELLS = ("ssh", "pdsh", "openmpi", "mpich", "impi")
_CONNECT_SECONDS, _PROBE_SECONDS = 10, 60
_NO_CONNECTION = 255  # ssh's own exit code


@dataclass(frozen=True)
class Hosts:
    """What the user says of hosts. As it is: all ranks on this one.

    hostfile: `name slots=N` lines, for launcher=deepspeed; shell: one of REMOTE_SHELLS, what reaches these hosts.
    nodes: hosts on which the same torchrun command is given; node_rank: this one's place among them, by itself in the
    order of arrival; rendezvous: HOST:PORT of the first.
    master_port: port of the first rank, by itself a free one. start_seconds: how long hosts may wait for one another.
    """

    hostfile: Path | None = None
    shell: str = "ssh"
    ssh_port: int | None = None
    nodes: int = 1
    node_rank: int | None = None
    rendezvous: str | None = None
    master_port: int | None = None
    start_seconds: float = 300.0

    @property
    def launcher(self) -> str | None:
        """What starts ranks there, if that is already said."""
        return "deepspeed" if self.hostfile is not None else "torchrun" if self.rendezvous is not None else None

    def check(self, launcher: str, world_size: int) -> None:
        """Whether these words go together."""
        if self.hostfile is not None and launcher != "deepspeed":
            raise GenattError(f"--hostfile with launcher={launcher}: use --launcher deepspeed")
        if self.hostfile is None and (self.shell != "ssh" or self.ssh_port is not None):
            raise GenattError("--ssh and --ssh-port without --hostfile: name the file of the hosts to reach")
        if self.shell not in REMOTE_SHELLS:
            raise GenattError(
                f"--ssh={self.shell} is unknown: use {', '.join(REMOTE_SHELLS)}; under Slurm start it by "
                "`srun genatt train --launcher slurm`"
            )
        several = self.nodes > 1 or self.node_rank is not None or self.rendezvous is not None
        if several and launcher != "torchrun":
            raise GenattError(
                f"--nnodes, --node-rank and --rendezvous with launcher={launcher}: use --launcher torchrun"
            )
        if not several:
            return
        if self.rendezvous is None:
            raise GenattError(
                f"--nnodes={self.nodes} without --rendezvous: give HOST:PORT of the first host, on every one"
            )
        endpoint(self.rendezvous)
        if world_size % self.nodes:
            raise GenattError(
                f"world_size={world_size} over --nnodes={self.nodes}: each host has as many ranks; set a multiple"
            )
        if self.node_rank is not None and not 0 <= self.node_rank < self.nodes:
            raise GenattError(f"--node-rank={self.node_rank} with --nnodes={self.nodes}: use 0 to {self.nodes - 1}")


@dataclass(frozen=True)
class Host:
    """A host of a hostfile. line: where it is named; slots: ranks it takes."""

    name: str
    slots: int
    line: int


def endpoint(text: str) -> tuple[str, int]:
    """HOST:PORT in two."""
    host, found, port = text.rpartition(":")
    if not found or not host or not port.isdigit() or not 0 < int(port) < 1 << 16:
        raise GenattError(f"--rendezvous={text} is not HOST:PORT: e.g. 10.0.0.1:29400")
    return host.strip("[]"), int(port)


def read_hostfile(path: Path, world_size: int) -> tuple[Host, ...]:
    """The hosts of a file in DeepSpeed's format, whose slots are as many as `world_size`."""
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise GenattError(f"--hostfile={path}: {getattr(error, 'strerror', None) or error}; name a text file") from None
    hosts: dict[str, Host] = {}
    for number, line in enumerate(lines, 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        count = words[1].removeprefix("slots=") if len(words) == 2 and words[1].startswith("slots=") else ""
        if not count.isdigit() or not int(count) or words[0].startswith("-"):
            raise GenattError(
                f"{path}, line {number}: {line.strip()!r} is not of the form `name slots=N`, N at least 1"
            )
        if words[0] in hosts:
            raise GenattError(
                f"{path}, line {number}: {words[0]} is there twice (line {hosts[words[0]].line}): add up its slots"
            )
        hosts[words[0]] = Host(words[0], int(count), number)
    if not hosts:
        raise GenattError(f"{path} names no host: add lines `name slots=N`")
    if (slots := sum(host.slots for host in hosts.values())) != world_size:
        shown = ", ".join(f"{host.name} {host.slots}" for host in list(hosts.values())[:4])
        more = ", …" if len(hosts) > 4 else ""
        raise GenattError(
            f"{path} has {slots} slots ({shown}{more}), but world_size={world_size}: set world_size={slots}, or mend "
            "the slots"
        )
    first = next(iter(hosts))
    if len(hosts) > 1 and is_loopback_name(first):
        raise GenattError(f"{path} names {first} first: the other hosts cannot reach it by that name; use its own")
    return tuple(hosts.values())


def ssh_command(host: str, port: int | None, *options: str) -> list[str]:
    """OpenSSH to `host`, which never asks anything."""
    limits = ("-o", "BatchMode=yes", "-o", f"ConnectTimeout={_CONNECT_SECONDS}")
    return ["ssh", *limits, *options, *(["-p", str(port)] if port else []), host]


def remote_python(module: str, *arguments: str) -> str:
    """Command line of a remote shell that runs a module here's Python way: same interpreter, same directory."""
    words = (sys.executable, "-m", module, *arguments)
    return f"cd {shlex.quote(str(Path.cwd()))} && exec {' '.join(shlex.quote(word) for word in words)}"


def address_of(host: str, port: int | None) -> str:
    """The name or address that ssh would connect to: the hostfile may hold an alias of ~/.ssh/config."""
    shown = subprocess.run(["ssh", "-G", *(["-p", str(port)] if port else []), host], capture_output=True, text=True)
    for line in shown.stdout.splitlines():
        if line.startswith("hostname "):
            return line.split()[1]
    return host


def check(hosts: Sequence[Host], path: Path, ssh_port: int | None) -> list[dict[str, Any]]:
    """What `probe` tells of every host. Raises GenattError that names each host which cannot be used."""
    with ThreadPoolExecutor(max_workers=min(len(hosts), 64)) as pool:
        answers = list(pool.map(lambda host: _probe(host.name, ssh_port), hosts))
    here, wrong = installed(), []
    for host, answer in zip(hosts, answers, strict=True):
        place = f"{path}, line {host.line}: host {host.name}"
        if isinstance(answer, str):
            wrong.append(f"{place} {answer}")
        elif answer["installed"] != here:
            differs = [
                f"{name} {answer['installed'].get(name)}, here {here[name]}"
                for name in here
                if answer["installed"].get(name) != here[name]
            ]
            wrong.append(f"{place} has other versions ({', '.join(differs)}): install the same")
    if wrong:
        more = f" (and {len(wrong) - 3} more hosts)" if len(wrong) > 3 else ""
        raise GenattError("; ".join(wrong[:3]) + more)
    return [answer for answer in answers if isinstance(answer, dict)]


def _probe(host: str, port: int | None) -> dict[str, Any] | str:
    """What a host says of itself, or what is wrong."""
    way = f"ssh {f'-p {port} ' if port else ''}{host}"
    command = [*ssh_command(host, port), remote_python("genatt_dist.launch.probe")]
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_PROBE_SECONDS)
    except subprocess.TimeoutExpired:
        return f"did not answer within {_PROBE_SECONDS} s: try `{way}`"
    except FileNotFoundError:
        return "cannot be reached: there is no `ssh` here; install OpenSSH's client"
    said = " ".join((done.stderr.strip().splitlines() or ["no message"])[-1].split())
    if done.returncode == _NO_CONNECTION:
        return f"cannot be reached by ssh ({said}): `{way} true` has to work without a question"
    if done.returncode:
        return f"cannot run {sys.executable} in {Path.cwd()} ({said}): install the same there, under the same path"
    for line in reversed(done.stdout.splitlines()):  # a shell's own words may stand around it
        with suppress(ValueError):
            if isinstance(answer := json.loads(line), dict):
                return answer
    return f"did not run what it was asked to: does `{way} echo yes` print yes?"
