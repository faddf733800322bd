"""Two hosts on one machine: network namespaces with a link between them, an sshd in each, one file system.

Needs root and Debian's iproute2, openssh-server and openssh-client (pdsh for what uses it); `missing` says what is not
there, and in a container without an init system installs it.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

PROGRAM = Path(sys.executable).with_name("genatt")
_PACKAGES = {"ip": "iproute2", "sshd": "openssh-server", "ssh": "openssh-client", "pdsh": "pdsh"}
_ADDRESS = {"a": "10.77.0.1", "b": "10.77.0.2"}
_SSHD = """
HostKey {directory}/host_key
AuthorizedKeysFile {directory}/key.pub
PidFile none
StrictModes no
UsePAM no
PasswordAuthentication no
PermitRootLogin yes
ClientAliveInterval 5
ClientAliveCountMax 2
"""
_SSH = """
Host host-a
  HostName 10.77.0.1
Host host-b
  HostName 10.77.0.2
Host *
  User root
  IdentityFile {directory}/key
  StrictHostKeyChecking no
  UserKnownHostsFile /dev/null
  LogLevel ERROR
"""


def missing() -> str:
    """Why there cannot be two hosts here; empty where there can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    absent = [package for program, package in _PACKAGES.items() if not _which(program)]
    in_container = not Path("/run/systemd/system").exists()  # elsewhere a package would start its service
    if absent and in_container and shutil.which("apt-get"):
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "timeout": 180}
        with suppress(subprocess.SubprocessError):
            subprocess.run(["apt-get", "update"], **quiet)
            subprocess.run(
                ["apt-get", "install", "-y", "--no-install-recommends", *absent],
                env=os.environ | {"DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"},
                **quiet,
            )
        absent = [package for program, package in _PACKAGES.items() if not _which(program)]
    if absent:
        return f"not installed: {', '.join(absent)}"
    name = f"genatt-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if made.returncode:
        return f"no network namespaces: {made.stderr.strip()}"
    linked = subprocess.run(["ip", "-n", name, "link", "add", "x", "type", "veth", "peer", "name", "y"])
    subprocess.run(["ip", "netns", "del", name], check=True)
    return "" if linked.returncode == 0 else "no virtual network links"


def _which(program: str) -> str | None:
    return shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")


@dataclass
class TwoHosts:
    """host-a and host-b, as ssh knows them by the `ssh` in `directory`."""

    directory: Path
    names: dict[str, str]
    sshds: list[subprocess.Popen]

    def command(self, host: str, *words: object) -> list[str]:
        """What runs a program on host `a` or `b`."""
        return ["ip", "netns", "exec", self.names[host], *(str(word) for word in words)]

    def start(self, host: str, *words: object, log: Path, **environment: str) -> subprocess.Popen:
        """A program there, in a process group of its own, with the environment of somebody who has logged in."""
        home = {"PATH": f"{self.directory}:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin", "HOME": str(self.directory)}
        with log.open("wb") as file:
            return subprocess.Popen(
                self.command(host, *words),
                env=home | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"} | environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def genatt(self, host: str, *words: object, log: Path, **environment: str) -> subprocess.Popen:
        return self.start(host, PROGRAM, *words, log=log, **environment)

    def cut(self, host: str) -> None:
        """Take the link of a host away, as if its cable was pulled: no connection is told."""
        subprocess.run(["ip", "-n", self.names[host], "link", "set", f"g{host}", "down"], check=True)

    def mend(self, host: str) -> None:
        subprocess.run(["ip", "-n", self.names[host], "link", "set", f"g{host}", "up"], check=True)

    def processes(self, host: str) -> list[psutil.Process]:
        """What runs there beside sshd and its sessions."""
        listed = subprocess.run(["ip", "netns", "pids", self.names[host]], capture_output=True, text=True, check=True)
        found = []
        for pid in listed.stdout.split():
            with suppress(psutil.Error):
                process = psutil.Process(int(pid))
                if process.name() != "sshd" and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def left(self, seconds: float) -> list[str]:
        """Command lines of what still runs on either host after so long."""
        deadline = time.monotonic() + seconds
        while (left := [*self.processes("a"), *self.processes("b")]) and time.monotonic() < deadline:
            time.sleep(0.2)
        shown = []
        for process in left:
            with suppress(psutil.Error):
                shown.append(" ".join(process.cmdline()))
        return shown


@contextmanager
def two_hosts(directory: Path) -> Iterator[TwoHosts]:
    """The hosts, and nothing of them afterwards."""
    names = {host: f"genatt-{os.getpid()}-{host}" for host in "ab"}
    for name in ("host_key", "key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", directory / name], check=True)
    (directory / "sshd_config").write_text(_SSHD.format(directory=directory))
    (directory / "ssh_config").write_text(_SSH.format(directory=directory))
    ssh = directory / "ssh"  # stands before the real one on PATH, so that whatever calls ssh knows the hosts
    ssh.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {directory}/ssh_config "$@"\n')
    ssh.chmod(0o755)
    Path("/run/sshd").mkdir(exist_ok=True)
    hosts = TwoHosts(directory, names, [])
    try:
        for name in names.values():
            _ip("netns", "add", name)
        _ip("link", "add", "ga", "netns", names["a"], "type", "veth", "peer", "name", "gb", "netns", names["b"])
        for host, name in names.items():
            _ip("-n", name, "addr", "add", f"{_ADDRESS[host]}/24", "dev", f"g{host}")
            _ip("-n", name, "link", "set", "lo", "up")
            _ip("-n", name, "link", "set", f"g{host}", "up")
            sshd = hosts.command(host, _which("sshd"), "-D", "-e", "-f", directory / "sshd_config")
            with (directory / f"sshd-{host}.log").open("wb") as log:
                hosts.sshds.append(subprocess.Popen(sshd, stdin=subprocess.DEVNULL, stdout=log, stderr=log))
        for host in "ab":
            _until_ssh_answers(hosts, host)
        yield hosts
    finally:
        for name in names.values():
            pids = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True).stdout.split()
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
        for sshd in hosts.sshds:
            sshd.wait()
        for name in names.values():
            subprocess.run(["ip", "netns", "del", name], check=False)


def _until_ssh_answers(hosts: TwoHosts, host: str) -> None:
    other, deadline = "b" if host == "a" else "a", time.monotonic() + 20
    command = hosts.command(other, hosts.directory / "ssh", "-o", "BatchMode=yes", f"host-{host}", "true")
    while (done := subprocess.run(command, capture_output=True, text=True)).returncode:
        log = (hosts.directory / f"sshd-{host}.log").read_text()
        assert time.monotonic() < deadline, f"{done.stderr}\n{log}"
        time.sleep(0.2)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)
