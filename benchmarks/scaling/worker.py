"""What a launcher starts, once a rank: `python -m benchmarks.scaling.worker`. It loads what a training worker loads and
forks a fresh process for every row, which dials the benchmark itself and answers until it is told to end.

So a row costs no start of the program, and what it allocated, hung in or was killed for goes with it. Messages are
lines of JSON over TCP, so that ranks may be on other machines; the address and a token come in the environment.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import resource
import signal
import socket
import sys
import traceback
from pathlib import Path
from typing import Any

import psutil

from genatt_dist.launch.limits import available_memory
from genatt_dist.launch.network import free_port

ADDRESS, TOKEN = "GENATT_BENCH_ADDRESS", "GENATT_BENCH_TOKEN"
MIB = 1 << 20
_NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "bad_alloc")
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class Channel:
    """One line of JSON at a time over a socket."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self._lines = connection.makefile("r", encoding="utf-8")

    @staticmethod
    def dial(**hello: Any) -> Channel:
        """To the benchmark that the environment names; `hello` says who calls."""
        host, _, port = os.environ[ADDRESS].rpartition(":")
        channel = Channel(socket.create_connection((host, int(port)), timeout=60))
        channel.socket.settimeout(None)
        channel.send(hello | {"token": os.environ[TOKEN]})
        return channel

    def send(self, message: dict[str, Any]) -> None:
        self.socket.sendall((json.dumps(message) + "\n").encode())

    def receive(self, seconds: float | None = None) -> dict[str, Any] | None:
        """The next message; None when the other side is gone. Raises TimeoutError after `seconds`."""
        self.socket.settimeout(seconds)
        try:
            line = self._lines.readline()
        except ConnectionError:
            return None
        return json.loads(line) if line.endswith("\n") else None

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()


def main() -> None:
    """Fork rows until the benchmark hangs up."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--local_rank", type=int, default=0, help="given by the deepspeed launcher; not needed")
    parser.parse_args()
    if not os.environ.get("BENCHMARK_STDERR"):
        for stream in (1, 2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    # Seconds that no row should spend again. The last comes with any ZeRO optimizer, and torch's compiler with it.
    for module in ("collectives", "breakdown", "work"):
        importlib.import_module(f"benchmarks.scaling.{module}")
    for module in ("genatt_dist.embedding.sharded", "deepspeed.runtime.zero.muon.muon_optimizer"):
        importlib.import_module(module)

    channel = Channel.dial(role="worker", slot=int(os.environ["RANK"]))
    children: dict[str, int] = {}
    try:
        while message := channel.receive():
            match message["do"]:
                case "port":
                    free = min(psutil.virtual_memory().available, available_memory())
                    channel.send({"port": free_port(), "memory": free})
                case "fork":
                    children[message["key"]] = _fork(channel, message)
                case "end":
                    channel.send({"code": _end(children.pop(message["key"]))})
    finally:
        for pid in children.values():
            _end(pid)
    os._exit(0)  # taking down all these libraries takes seconds


def _fork(channel: Channel, message: dict[str, Any]) -> int:
    if pid := os.fork():
        return pid
    code = 1
    try:
        channel.socket.close()  # the parent's; this process dials for itself
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the benchmark's to answer
        if sys.platform == "linux":
            import ctypes

            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        os.environ.update(message["environment"])
        _serve(message["key"], message["slot"], message["core"])
        code = 0
    finally:
        os._exit(code)  # nothing that the parent registered for its own end


def _serve(key: str, slot: int, core: int) -> None:
    """A row's life on this rank: answers until the benchmark hangs up. slot: the worker's rank, which a row's group may
    number otherwise.
    """
    channel = Channel.dial(role="row", key=key, slot=slot)
    row = Row(core)
    while message := channel.receive():
        try:
            answer = getattr(row, message.pop("do"))(**message)
        except (MemoryError, RuntimeError) as error:
            text = str(error)
            memory = isinstance(error, MemoryError) or any(sign in text for sign in _NO_MEMORY)
            if os.environ.get("BENCHMARK_STDERR"):
                traceback.print_exc()
            note = text.splitlines()[0] if text else "memory is used up"
            answer = {"failed": "out_of_memory" if memory else "error", "note": note[:300]}
        except Exception as error:
            if os.environ.get("BENCHMARK_STDERR"):
                traceback.print_exc()
            answer = {"failed": "error", "note": f"{type(error).__name__}: {error}".splitlines()[0][:300]}
        channel.send(answer)


class Row:
    """What a rank of a row can be asked. Everything heavy is imported here, in the forked process (it is loaded)."""

    def __init__(self, core: int) -> None:
        from genatt_dist.training.engine import init_process_group, select_device

        self._device = select_device()
        self._cores: list[int] | None = None
        if self._device.type == "cpu" and hasattr(os, "sched_setaffinity"):
            own = sorted(os.sched_getaffinity(0))
            os.sched_setaffinity(0, {own[core % len(own)]})
            self._cores = sorted(os.sched_getaffinity(0))
        init_process_group(self._device)

    def make(self, spec: dict[str, Any], memory: int | None) -> dict[str, Any]:
        """Build what is trained; from now on this process may take `memory` bytes more (on a GPU: what it has)."""
        import torch

        from benchmarks.scaling.grid import Spec
        from benchmarks.scaling.work import Subject

        if memory is not None and self._device.type == "cpu" and sys.platform == "linux":
            status = Path("/proc/self/status").read_text()
            data = 1024 * int(status.partition("VmData:")[2].split()[0])
            resource.setrlimit(resource.RLIMIT_DATA, (data + memory, resource.RLIM_INFINITY))
        self._subject = Subject(Spec(**spec), self._device)
        name = torch.cuda.get_device_name(self._device) if self._device.type == "cuda" else "cpu"
        return {"device": name, "threads": torch.get_num_threads(), "cores": self._cores, "pid": os.getpid()}

    def steps(self, count: int) -> dict[str, Any]:
        """Seconds of each of `count` steps, and the process's peak memory so far."""
        from benchmarks import table_rank

        return {"seconds": self._subject.steps(count), "peak_bytes": table_rank.memory()["peak"]}

    def profile(self, count: int, trace: str | None) -> dict[str, Any]:
        """Share of a step by part (`breakdown.PARTS`). trace: where rank 0 puts chrome's trace."""
        from benchmarks.scaling.breakdown import profiled

        place = Path(trace) if trace and os.environ["RANK"] == "0" else None
        return {"parts": profiled(self._subject.steps, count, place)}

    def collectives(self, sizes: list[int], repeats: int) -> dict[str, Any]:
        """Seconds of each collective at each size."""
        from benchmarks.scaling.collectives import timed

        return {"rows": timed(sizes, repeats, self._device)}


def _end(pid: int) -> int:
    """Kill a row's process; its wait status says whether it had ended by itself, or was killed, before."""
    done, status = os.waitpid(pid, os.WNOHANG)
    if not done:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        return 0
    return os.waitstatus_to_exitcode(status)


if __name__ == "__main__":
    main()
