"""A live Ray cluster of two nodes on loopback addresses, and a local S3, each ended by the ids of its own processes.

The head is on 127.0.0.2 with the Jobs API, the second node on 127.0.0.3; each has a temporary directory of its own. On
a machine whose cores are busy a node takes up to two minutes to start.
"""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import requests

ROOT = Path(__file__).parents[2]
HEAD, SECOND = "127.0.0.2", "127.0.0.3"
START_SECONDS = 240.0
ATTEMPTS = 2
_STORE_BYTES = 150 << 20


class Cluster:
    """Two nodes with `cpus` CPUs each; nothing runs until `start`. environment: of all of Ray's processes.

    access: the variables by which a process may use it: Ray asks for a token, and this cluster has one of its own.
    """

    def __init__(self, environment: Mapping[str, str], cpus: int = 1) -> None:
        self.place = Path(tempfile.mkdtemp(prefix="gj-", dir="/tmp"))  # Ray's socket paths have to be short
        self.scratch = self.place / "t"  # of the jobs: copies of run directories, while they train
        self.access = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        self._environment, self._cpus = dict(environment), cpus
        self._nodes: dict[str, subprocess.Popen[bytes]] = {}
        self._family: set[psutil.Process] = set()
        self._port = self._dashboard = 0
        self._starts = 0

    @property
    def address(self) -> str:
        """Of the Jobs API."""
        return f"http://{HEAD}:{self._dashboard}"

    def start(self) -> None:
        """Both nodes, fresh: a head that was killed has forgotten its jobs."""
        for attempt in range(ATTEMPTS):
            try:
                self._start()
                return
            except (AssertionError, OSError):
                self.stop()
                if attempt + 1 == ATTEMPTS:
                    raise

    def _start(self) -> None:
        self._port, self._dashboard = free_port(HEAD), free_port(HEAD)
        dashboard = ["--dashboard-host", HEAD, "--dashboard-port", str(self._dashboard)]
        self._node(HEAD, ["--head", "--port", str(self._port), *dashboard, "--include-dashboard", "true"])
        self._wait(lambda: self._get("api/version").ok)
        self._node(SECOND, ["--address", f"{HEAD}:{self._port}"])
        self._wait(lambda: self._alive() == 2)

    def _node(self, host: str, options: list[str]) -> None:
        self._starts += 1
        self.scratch.mkdir(exist_ok=True)
        program = Path(sys.executable).with_name("ray")
        ports = {
            f"--{name}": str(free_port(host))
            for name in ("dashboard-agent-listen-port", "dashboard-agent-grpc-port", "runtime-env-agent-port")
        }
        settings = {
            "--node-ip-address": host,
            "--num-cpus": str(self._cpus),
            "--object-store-memory": str(_STORE_BYTES),
            "--temp-dir": str(self.place / str(self._starts)),
            "--ray-client-server-port": str(free_port(host, beyond=20_000)),
            "--metrics-export-port": str(free_port(host)),
            **ports,
        }
        if "--head" not in options:
            del settings["--ray-client-server-port"]
        words = [word for pair in settings.items() for word in pair]
        with open(self.place / f"{self._starts}.log", "wb") as log:
            self._nodes[host] = subprocess.Popen(
                [str(program), "start", "--block", "--disable-usage-stats", *options, *words],
                env=self._of_nodes(),
                cwd=self.place,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _of_nodes(self) -> dict[str, str]:
        """Jobs start `python`; what they keep for a while is found below `scratch`."""
        inherited = {name: os.environ[name] for name in ("HOME", "LANG") if name in os.environ}
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
        quiet = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_RECORD_ACTOR_TASK_LOGGING": "0", "OMP_NUM_THREADS": "1"}
        return {**inherited, **quiet, "PATH": path, "TMPDIR": str(self.scratch), **self.access, **self._environment}

    def _alive(self) -> int:
        answer = self._get("nodes?view=summary").json()
        return sum(node["raylet"].get("state") == "ALIVE" for node in answer["data"]["summary"])

    def _get(self, path: str) -> requests.Response:
        headers = {"Authorization": f"Bearer {self.access['RAY_AUTH_TOKEN']}"}
        return requests.get(f"{self.address}/{path}", headers=headers, timeout=5)

    def _wait(self, ready: object) -> None:
        assert callable(ready)
        deadline = time.monotonic() + START_SECONDS
        while True:
            with suppress(requests.RequestException, KeyError, ValueError):
                if ready():
                    return
            said = "\n".join(path.read_text()[-2000:] for path in sorted(self.place.glob("*.log")))
            assert all(node.poll() is None for node in self._nodes.values()), said
            assert time.monotonic() < deadline, said
            time.sleep(0.2)

    def workers(self, title: str) -> list[psutil.Process]:
        """Ray's workers of our nodes whose title (`ray::NAME.method`) begins so."""
        return [process for process in self._processes() if _title(process).startswith(f"ray::{title}")]

    def kill_head(self) -> None:
        """As a machine that loses its power: GCS, raylet, dashboard, jobs and workers of the head at once."""
        self._kill([self._nodes.pop(HEAD)])

    def stop(self) -> None:
        """End what was started."""
        self._kill([self._nodes.pop(host) for host in list(self._nodes)])

    def _kill(self, nodes: list[subprocess.Popen[bytes]]) -> None:
        for _ in range(10):  # what was being started while the others were ended, too
            if not (family := list(self._processes(nodes))):
                return
            for process in family:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(family, timeout=20)
            for node in nodes:
                node.poll()

    def _processes(self, nodes: list[subprocess.Popen[bytes]] | None = None) -> Iterator[psutil.Process]:
        """All that descends from nodes, and what of Ray's own has lost its parent: that names the node's directory."""
        marks = []
        for node in list(self._nodes.values()) if nodes is None else nodes:
            assert isinstance(node.args, list)
            marks.append(f"{node.args[node.args.index('--temp-dir') + 1]}/")
            with suppress(psutil.NoSuchProcess):
                parent = psutil.Process(node.pid)
                if parent.status() != psutil.STATUS_ZOMBIE:
                    yield from (*parent.children(recursive=True), parent)
        for process in psutil.process_iter():
            if any(mark in _title(process) for mark in marks):
                yield process

    def end(self) -> None:
        """Stop it, and remove its files."""
        self.stop()
        shutil.rmtree(self.place, ignore_errors=True)


@contextmanager
def s3_server() -> Iterator[str]:
    """The endpoint of a moto server of its own; any credentials do."""
    port = free_port("127.0.0.1")
    clean = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    moto = subprocess.Popen(command, env=clean, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while True:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert moto.poll() is None, "moto has ended"
            assert time.monotonic() < deadline, "moto does not start"
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
    finally:
        moto.kill()
        moto.wait()


def free_port(host: str, beyond: int = 0) -> int:
    """A port that nothing uses on this address now. beyond: outside Ray's range of workers' ports, 10002 to 19999."""
    while True:
        with socket.socket() as probe:
            probe.bind((host, 0))
            port = int(probe.getsockname()[1])
        if port > beyond:
            return port


def _title(process: psutil.Process) -> str:
    with suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
        return " ".join(process.cmdline())
    return ""
