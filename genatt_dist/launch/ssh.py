"""The deepspeed launcher on several hosts by OpenSSH alone: `python -m genatt_dist.launch.ssh ORDER`.

DeepSpeed's own way asks for pdsh, puts the environment on command lines, and leaves ranks running where a connection
breaks. Here each host runs `genatt_dist.launch.host`, which starts `deepspeed --no_ssh --node_rank=N` there: it gets
its order and the environment on its standard input, then a sign of life every second, and ends its ranks without it.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from typing import Any

from data_pipeline.errors import GenattError, ResumableError
from genatt_dist.launch.environment import travelling
from genatt_dist.launch.group import Group
from genatt_dist.launch.hosts import remote_python, ssh_command

ALIVE, STOP = b".", b"S"  # what a host is told after its order
_AGENT = "genatt_dist.launch.host"
_LOOK_SECONDS, _SIGN_SECONDS = 0.2, 1.0
_NAMED_SECONDS = 15.0  # beside silence_seconds: ranks name the one that was lost, and end themselves
_LATE_SECONDS = 10.0  # beside stop_seconds: a host ends its ranks itself, then its connection


def main() -> None:
    """Start the ranks on all hosts, and end with the first exit code that is not 0."""
    order: dict[str, Any] = json.loads(sys.argv[1])
    asked: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: asked.append(number))
    seen, secret = travelling()
    hosts = [_Connection(name, order, seen | secret) for name in order["hosts"]]
    try:
        code = _watch(hosts, order, asked)
    finally:
        for host in hosts:
            if host.code is None:  # the number of one that ended long ago may be another's
                host.group.kill()
    sys.exit(code)


def _watch(hosts: list[_Connection], order: dict[str, Any], asked: list[int]) -> int:
    """Until all hosts have ended; the first exit code that is not 0. One that fails has the others stopped: at once
    after a mistake of the user's, else when their ranks have had time to name the one that they lost.
    """
    first, signed = 0, 0.0
    stop_at, kill_at = math.inf, math.inf
    while running := [host for host in hosts if host.code is None]:
        now = time.monotonic()
        if failed := [host for host in hosts if host.code and not host.told]:
            for host in failed:
                host.told = True
                if host.code != ResumableError.exit_code:  # which the ranks explain
                    print(f"host {host.name}: {_ending(host.code)}", file=sys.stderr, flush=True)
            first = first or int(failed[0].code or 0)
            at_once = any(host.code == GenattError.exit_code for host in failed)
            stop_at = min(stop_at, now if at_once else now + order["silence_seconds"] + _NAMED_SECONDS)
        if asked:
            stop_at = min(stop_at, now)
        if now >= stop_at and kill_at == math.inf:
            kill_at = now + order["stop_seconds"] + _LATE_SECONDS
            for host in running:
                host.tell(STOP)
        if now >= kill_at:
            break
        if now - signed >= _SIGN_SECONDS:
            signed = now
            for host in running:
                host.tell(ALIVE)
        time.sleep(_LOOK_SECONDS)
    return first or next((code for host in hosts if (code := host.code)), 0)


def _ending(code: int | None) -> str:
    return "its connection was lost" if code == 255 else f"its ranks ended with exit code {code}"


class _Connection:
    """The ssh to one host, in a session of its own: a signal to the launcher's group must not cut it."""

    def __init__(self, name: str, order: dict[str, Any], environment: dict[str, str]) -> None:
        self.name, self.told = name, False
        silent = max(1, math.ceil(order["silence_seconds"] / 5))
        alive = ("-o", "ServerAliveInterval=5", "-o", f"ServerAliveCountMax={silent}")
        command = [*ssh_command(name, order["ssh_port"], *alive), remote_python(_AGENT)]
        self.group = Group(command, os.environ, stdin=subprocess.PIPE)
        own = order | {"node": list(order["hosts"]).index(name), "environment": environment}
        self.tell(json.dumps(own).encode() + b"\n")

    @property
    def code(self) -> int | None:
        return self.group.process.poll()

    def tell(self, words: bytes) -> None:
        stdin = self.group.process.stdin
        assert stdin is not None
        with suppress(OSError):  # it has ended: `code` tells
            stdin.write(words)
            stdin.flush()


if __name__ == "__main__":
    main()
