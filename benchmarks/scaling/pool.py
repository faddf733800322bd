"""The benchmark's end of its workers: starts them by a launcher, and has rows forked, asked and ended.

One launcher starts as many workers as the largest number of ranks; a row is a set of fresh processes on some of them,
with a process group of its own. Rows may live at the same time and take turns. Everything that waits has a time limit.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import select
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.scaling.grid import Spec
from benchmarks.scaling.worker import ADDRESS, TOKEN, Channel
from data_pipeline.errors import GenattError
from genatt_dist.launch.environment import worker_environment
from genatt_dist.launch.group import Group
from genatt_dist.launch.launchers import deepspeed_program, with_python
from genatt_dist.launch.network import free_port

_WORKER = "benchmarks.scaling.worker"
_START_SECONDS, _FORK_SECONDS, _END_SECONDS = 240.0, 60.0, 30.0
_GRACE_SECONDS, _DYING_SECONDS = 2.0, 0.5
_AGAIN = "run again with BENCHMARK_STDERR=1 to see why"
_ROOT = Path(__file__).parents[2]


class RowError(Exception):
    """A row that could not be measured. status: out_of_memory, time_limit or error."""

    def __init__(self, status: str, note: str) -> None:
        super().__init__(note)
        self.status, self.note = status, note


class Pool:
    """The workers, one a rank. A context: leaving it ends them and all rows."""

    def __init__(self, launcher: str, ranks: int, limit: float, room_seconds: float = 300.0) -> None:
        """limit: seconds that a row may take to answer. room_seconds: until Ray has room for the workers.

        Raises GenattError where the workers do not come.
        """
        self.ranks, self._limit, self._room_seconds = ranks, limit, room_seconds
        self._stack = contextlib.ExitStack()
        self._calls: dict[tuple[str, int], Channel] = {}
        self._hosts: dict[int, str] = {}
        self._forked: set[tuple[str, int]] = set()
        self._count = 0
        self._token = secrets.token_hex(16)
        try:
            self._start(launcher)
        except BaseException:
            self._stack.close()
            raise

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        for channel in self._calls.values():
            channel.close()
        self._stack.close()

    @property
    def hosts(self) -> list[int]:
        """Ranks on each host, by no name that would tell where this ran."""
        names = list(self._hosts.values())
        return [names.count(name) for name in dict.fromkeys(names)]

    def free_memory(self) -> int:
        """Bytes that are free on the host that has least of them, for each of its ranks."""
        free = []
        for rank in range(self.ranks):
            here = list(self._hosts.values()).count(self._hosts[rank])
            free.append(int(self._ask_worker(rank, do="port")["memory"]) // here)
        return min(free)

    @contextlib.contextmanager
    def row(self, spec: Spec) -> Iterator[Row]:
        """The processes of a row, until the context ends. Raises RowError where they do not come."""
        self._count += 1
        keys = [f"{self._count}"] * spec.ranks
        if spec.independent:
            keys = [f"{self._count}.{rank}" for rank in range(spec.ranks)]
        try:
            addresses = {key: self._address(rank) for rank, key in reversed(list(enumerate(keys)))}
            for rank, key in enumerate(keys):
                own = {"RANK": 0, "WORLD_SIZE": 1} if spec.independent else {"RANK": rank, "WORLD_SIZE": spec.ranks}
                local = self._local(rank)
                own |= {"LOCAL_RANK": 0 if spec.independent else local, "LOCAL_WORLD_SIZE": self._beside(spec, rank)}
                own["TORCHELASTIC_USE_AGENT_STORE"] = False  # torchrun's store is of its own ranks; a row makes one
                environment = {name: str(value) for name, value in (addresses[key] | own).items()}
                worker = self._calls["worker", rank]
                worker.send({"do": "fork", "key": key, "core": local, "environment": environment, "slot": rank})
                self._forked.add((key, rank))
            wanted = [(key, rank) for rank, key in enumerate(keys)]
            self._accept(wanted, _FORK_SECONDS, "a row's process")
            yield Row(self, wanted, self._limit)
        finally:
            for rank, key in enumerate(keys):
                self.end(key, rank)

    def end(self, key: str, rank: int) -> int:
        """End a row's process if it runs. How it had ended by itself: its exit code, or minus a signal; else 0."""
        if (channel := self._calls.pop((key, rank), None)) is not None:
            channel.close()
        if (key, rank) not in self._forked:
            return 0
        self._forked.remove((key, rank))
        return int(self._ask_worker(rank, do="end", key=key)["code"])

    def channel(self, key: str, rank: int) -> Channel:
        return self._calls[key, rank]

    def _address(self, rank: int) -> dict[str, Any]:
        host = "127.0.0.1" if len(self.hosts) == 1 else self._hosts[rank]
        return {"MASTER_ADDR": host, "MASTER_PORT": self._ask_worker(rank, do="port")["port"]}

    def _local(self, rank: int) -> int:
        return [other for other, host in self._hosts.items() if host == self._hosts[rank]].index(rank)

    def _beside(self, spec: Spec, rank: int) -> int:
        return 1 if spec.independent else sum(self._hosts[other] == self._hosts[rank] for other in range(spec.ranks))

    def _ask_worker(self, rank: int, **message: Any) -> dict[str, Any]:
        channel = self._calls["worker", rank]
        channel.send(message)
        try:
            answer = channel.receive(_END_SECONDS)
        except TimeoutError:
            answer = None
        if answer is None:
            raise GenattError(f"the benchmark's worker of rank {rank} ended: {_AGAIN}")
        return answer

    def _start(self, launcher: str) -> None:
        host = "127.0.0.1"
        if launcher == "ray":
            from benchmarks.scaling import ray_workers

            host = self._stack.enter_context(ray_workers.connected())
        self._server = self._stack.enter_context(socket.create_server((host, 0)))
        own = {ADDRESS: f"{host}:{self._server.getsockname()[1]}", TOKEN: self._token}
        # Equal threads a rank at every number of ranks: one.
        path = os.pathsep.join([str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        own |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
        if launcher == "ray":
            self._stack.enter_context(ray_workers.start(_WORKER, self.ranks, own, self._room_seconds))
            running = None
        else:
            environment = worker_environment(dict(os.environ) | own, self.ranks) | own
            environment.setdefault("DS_ACCELERATOR", _device(self.ranks))
            running = Group(_command(launcher, self.ranks, environment), environment)
            self._stack.callback(_end, running)
        self._accept([("worker", rank) for rank in range(self.ranks)], _START_SECONDS, "a worker", running)

    def _accept(
        self, wanted: Sequence[tuple[str, int]], seconds: float, what: str, running: Group | None = None
    ) -> None:
        """Take calls until all wanted ones are there."""
        deadline = time.monotonic() + seconds
        while missing := [one for one in wanted if one not in self._calls]:
            if running is not None and running.process.poll() is not None:
                raise GenattError(f"the launcher ended with exit code {running.process.returncode}: {_AGAIN}")
            if time.monotonic() > deadline:
                raise RowError(
                    "time_limit", f"{what} of rank {missing[0][1]} did not come in {seconds:.0f} s: {_AGAIN}"
                )
            if not select.select([self._server], [], [], 0.5)[0]:
                continue
            connection, address = self._server.accept()
            channel = Channel(connection)
            try:
                hello = channel.receive(10)
            except (TimeoutError, ValueError):
                hello = None
            if hello is None or not secrets.compare_digest(str(hello.get("token")), self._token):
                channel.close()
                continue
            worker = hello["role"] == "worker"
            # A row says the worker's rank (its own group may number it otherwise).
            self._calls["worker" if worker else hello["key"], hello["slot"]] = channel
            if worker:
                self._hosts[hello["slot"]] = address[0]
        self._hosts = dict(sorted(self._hosts.items()))


class Row:
    """The processes of one row."""

    def __init__(self, pool: Pool, members: list[tuple[str, int]], limit: float) -> None:
        self._pool, self._members, self._limit = pool, members, limit

    def end(self) -> None:
        """End its processes, whatever they are at."""
        for member in self._members:
            self._pool.end(*member)

    def ask(self, do: str, **arguments: Any) -> list[dict[str, Any]]:
        """The answer of every rank. Raises RowError when one has none in time; the row is of no use then."""
        for member in self._members:
            self._pool.channel(*member).send({"do": do, **arguments})
        answers: dict[tuple[str, int], dict[str, Any]] = {}
        failures: list[tuple[str, str]] = []
        deadline = time.monotonic() + self._limit
        while waiting := [member for member in self._members if member not in answers]:
            sockets = {self._pool.channel(*member).socket: member for member in waiting}
            ready = select.select(list(sockets), [], [], max(0.0, deadline - time.monotonic()))[0]
            if not ready:
                break
            for each in ready:
                member = sockets[each]
                answer = self._pool.channel(*member).receive(_END_SECONDS)
                if answer is None:
                    failures.append(self._ended(member))
                    answers[member] = {}
                    self._members = [other for other in self._members if other != member]
                elif "failed" in answer:
                    failures.append((answer["failed"], answer["note"]))
                answers[member] = answer or {}
            if failures:  # the others mostly wait for it; what they say soon may be the better reason
                deadline = min(deadline, time.monotonic() + _GRACE_SECONDS)
        if failures:
            raise RowError(*min(failures, key=lambda failure: failure[0] != "out_of_memory"))
        if len(answers) < len(self._members):
            raise RowError("time_limit", f"no answer to `{do}` in {self._limit:.0f} s")
        return [answers[member] for member in self._members]

    def _ended(self, member: tuple[str, int]) -> tuple[str, str]:
        time.sleep(_DYING_SECONDS)  # its connection ends before the process does
        code = self._pool.end(*member)
        if code == -9:
            return "out_of_memory", "the system killed the process"
        return "error", f"the process of rank {member[1]} ended with exit code {code}: {_AGAIN}"


def _device(ranks: int) -> str:
    from genatt_dist.launch.places import device_type

    return device_type(ranks)


def _command(launcher: str, ranks: int, environment: dict[str, str]) -> list[str]:
    port = str(free_port())
    if launcher == "torchrun":
        program = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
        return [*program, "--master-addr", "127.0.0.1", "--master-port", port, "-m", _WORKER]
    environment["PATH"] = with_python(environment.get("PATH", ""))
    address = ["--master_addr", "127.0.0.1", "--master_port", port]
    nowhere = ["--hostfile", os.devnull + "/none"]  # a path that is no file: /job/hostfile is not this run's business
    ranks_here = ["--num_accelerators", str(ranks)]
    return [deepspeed_program(), *nowhere, *ranks_here, *address, "--log_level", "error", "--module", _WORKER]


def _end(group: Group) -> None:
    """The workers end by themselves once the calls are closed, and the launcher after them."""
    with contextlib.suppress(Exception):
        group.process.wait(_END_SECONDS / 3)
    group.kill()
