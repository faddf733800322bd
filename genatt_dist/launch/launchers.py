"""The same worker under every launcher: a single process, torchrun, the deepspeed launcher, a task of Slurm.

`launch` starts it with the allocator and thread settings it needs, passes signals on, and ends all it made. Where it is
killed outright, the kernel ends what it had started, and workers watch it (`launch/orphan.py`).
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from data_pipeline.errors import GenattError, ResumableError
from genatt_dist.launch import ending, rank
from genatt_dist.launch.environment import between_hosts, travelling, with_python, worker_environment
from genatt_dist.launch.group import NOW, STOP, Group
from genatt_dist.launch.network import free_port
from genatt_dist.launch.orphan import LAUNCHER_PID
from genatt_dist.launch.places import Place
from genatt_dist.training.heartbeat import HEARTBEAT
from genatt_dist.training.options import TrainingConfig

_WORKER = "genatt_dist.launch.worker"
_GRACE_SECONDS = 10
_ONE_PRESS_SECONDS = 1.0
_WITHOUT_MIDDLE = ("process", "slurm")  # the worker is the child; programs between answer SIGINT by a traceback
# How names begin that the deepspeed launcher, by itself, puts on command lines with what they are here.
_SENT_BY_DEEPSPEED = ("MLFLOW", "PYTHON", "MV2", "UCX", "NCCL")


def launch(run: Path, launcher: str, training: TrainingConfig, place: Place, resume: bool = False) -> None:
    """Run the ranks of `place` to their end. SIGTERM and Ctrl-C ask them to stop; a second Ctrl-C ends them at once.

    Raises ResumableError when they stopped in order or were killed, GenattError when they fail or cannot be started.
    """
    if place.first:
        ending.forget(run)
    place.begin(run)
    # The directory has no option of its own: torchrun would take `--run` for an abbreviation of its `--run-path`.
    arguments = [str(run.absolute()), "--launcher", launcher, *(["--resume"] if resume else [])]
    environment = _environment(place)
    grace = (training.stop_seconds + _GRACE_SECONDS) * (2 if place.machines else 1)
    with tempfile.TemporaryDirectory(prefix="genatt-") as scratch, _signals() as received:
        command = _COMMANDS[launcher](Start(place, arguments, environment, training, Path(scratch)))
        group = Group(command, environment)
        try:
            begun = _Beginning(run, place)
            code = group.wait(lambda: _asked(received, launcher) or begun.late(), grace)
        finally:
            group.kill()
    ending.tell_stopped(run)
    if code and begun.late():
        raise GenattError(
            f"no rank of {run} began within {place.hosts.start_seconds:.0f} s under --ssh={place.hosts.shell}; its "
            "messages are above: mend that, or allow more by --start-seconds"
        )
    if code == ResumableError.exit_code:  # before rank 0's word could be written, or seen here
        raise ResumableError(
            f"{run} stopped; its messages are above: the same command again, with --resume where it has a checkpoint"
        )
    if received:
        _raise_again(received[0][0])
    ending.tell_killed(run, code, training.checkpoint)
    if code:
        raise GenattError(
            f"training in {run} ended with exit code {code} under launcher={launcher}; its messages are above"
        )


class _Beginning:
    """Whether ranks on other hosts have begun in time: what starts them there may wait for ever (MPICH's does)."""

    def __init__(self, run: Path, place: Place) -> None:
        self._path, self._limited = run / HEARTBEAT, bool(place.machines)
        self._deadline = time.monotonic() + place.hosts.start_seconds

    def late(self) -> int:
        """STOP if they are late."""
        late = self._limited and time.monotonic() > self._deadline and not self._path.exists()
        return STOP if late else 0


def _environment(place: Place) -> dict[str, str]:
    """Of what is started here. Ranks on other hosts have no process here to watch, and count their own cores."""
    base = {key: value for key, value in os.environ.items() if key != LAUNCHER_PID}
    own = {"DS_ACCELERATOR": place.device}
    if place.machines:
        return base | own
    if "DS_ACCELERATOR" not in base and place.device == "cpu":
        import torch  # here, not above: `genatt --help` answers without it

        if gpus := torch.cuda.device_count():
            print(
                f"note: {place.local_ranks} ranks on the CPU: {gpus} GPU(s) are here, and a rank needs one",
                file=sys.stderr,
            )
    own |= {LAUNCHER_PID: str(os.getpid()), "LOCAL_WORLD_SIZE": str(place.local_ranks)}
    environment = worker_environment(base, place.local_ranks) | own
    return environment if place.alone else between_hosts(environment, place.master)


@contextmanager
def _signals() -> Iterator[list[tuple[int, float]]]:
    """SIGTERM and SIGINT and when they came, instead of what they would do: workers are to stop first."""
    received: list[tuple[int, float]] = []
    if threading.current_thread() is not threading.main_thread():  # only the main thread may ask for signals
        yield received
        return
    watched = (signal.SIGTERM, signal.SIGINT)
    previous = [
        signal.signal(number, lambda number, _: received.append((number, time.monotonic()))) for number in watched
    ]
    try:
        yield received
    finally:
        for number, handler in zip(watched, previous, strict=True):
            signal.signal(number, handler)


def _asked(received: list[tuple[int, float]], launcher: str) -> int:
    """What `Group.wait` is to do. Only a second Ctrl-C ends at once: schedulers repeat SIGTERM."""
    presses = [when for number, when in received if number == signal.SIGINT]
    if presses and presses[-1] - presses[0] > _ONE_PRESS_SECONDS:
        return NOW
    if not received:
        return 0
    return received[0][0] if launcher in _WITHOUT_MIDDLE else STOP


def _raise_again(number: int) -> None:
    """What the signal would have done without `_signals`; as an exception where it would end this process."""
    if signal.getsignal(number) == signal.SIG_DFL:
        sys.exit(128 + number)
    signal.raise_signal(number)


def check_launcher(launcher: str, world_size: int) -> None:
    """Whether there is such a launcher and it can start so many ranks."""
    if launcher not in LAUNCHERS:
        raise GenattError(f"launcher={launcher} is unknown: use {', '.join(LAUNCHERS)}")
    if launcher == "process" and world_size > 1:
        raise GenattError(f"launcher=process runs one rank, but world_size={world_size}: use torchrun or deepspeed")


def single_process() -> dict[str, str]:
    """What a launcher would say to the one rank of a world of one."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"} | address


class Start:
    """What a launcher's command line is made of. It may add to `environment`, and write files into `scratch`."""

    def __init__(
        self, place: Place, arguments: list[str], environment: dict[str, str], training: TrainingConfig, scratch: Path
    ) -> None:
        self.place, self.arguments, self.environment = place, arguments, environment
        self.training, self.scratch = training, scratch


def _process(start: Start) -> list[str]:
    start.environment.update(single_process())
    return [sys.executable, "-m", _WORKER, *start.arguments]


def _slurm(start: Start) -> list[str]:
    start.environment.update(start.place.task | {"MASTER_PORT": str(start.place.port)})
    return [sys.executable, "-m", _WORKER, *start.arguments]


def _torchrun(start: Start) -> list[str]:
    place, hosts = start.place, start.place.hosts
    program = [sys.executable, "-m", "genatt_dist.launch.torchrun", "--nproc-per-node", str(place.local_ranks)]
    # The static rendezvous: who is first is known, and ranks follow the hosts' places.
    nodes = ["--nnodes", str(hosts.nodes), "--node-rank", str(place.node_rank)]
    address = ["--master-addr", place.master, "--master-port", str(place.port)]
    limits = ["--rdzv-conf", f"timeout={hosts.start_seconds:.0f}"]
    limits += ["--shutdown-timeout", f"{start.training.stop_seconds + _GRACE_SECONDS / 2:.0f}"]
    return [*program, *nodes, *address, *limits, "-m", _WORKER, *start.arguments]


def _deepspeed(start: Start) -> list[str]:
    if start.place.machines:
        return _over_ssh(start) if start.place.hosts.shell == "ssh" else _over_shell(start)
    place, environment = start.place, start.environment
    environment["PATH"] = with_python(environment.get("PATH", ""))
    address = ["--master_addr", place.master, "--master_port", str(place.port)]
    # Given a number, the launcher overrides CUDA_VISIBLE_DEVICES; given places, it keeps to them.
    visible = environment.get("CUDA_VISIBLE_DEVICES", "") if place.device == "cuda" else ""
    gpus = visible.split(",")[: place.local_ranks] if visible else []
    if not all(gpu.isdigit() for gpu in gpus) or 0 < len(gpus) < place.local_ranks:
        raise GenattError(
            f"CUDA_VISIBLE_DEVICES={visible} does not number {place.local_ranks} GPUs, which the deepspeed launcher "
            "needs: use --launcher torchrun"
        )
    places = ["--include", "localhost:" + ",".join(gpus)] if gpus else []
    ranks = places or ["--num_accelerators", str(place.local_ranks)]
    # A path that is no file: /job/hostfile, the launcher's default, is not this run's business.
    nowhere = ["--hostfile", str(start.scratch / "no-hostfile")]
    return [
        deepspeed_program(),
        *nowhere,
        *ranks,
        *address,
        "--log_level",
        "error",
        "--module",
        _WORKER,
        *start.arguments,
    ]


def _over_ssh(start: Start) -> list[str]:
    place = start.place
    order = {
        "hosts": {machine.name: machine.slots for machine in place.machines},
        "ssh_port": place.hosts.ssh_port,
        "master": place.master,
        "port": place.port,
        "token": place.token,
        "worker": _WORKER,
        "arguments": start.arguments,
        "stop_seconds": start.training.stop_seconds + _GRACE_SECONDS,
        "silence_seconds": start.training.silence_seconds,
    }
    return [sys.executable, "-m", "genatt_dist.launch.ssh", json.dumps(order)]


def _over_shell(start: Start) -> list[str]:
    """The deepspeed launcher reaches the hosts by itself: what it passes on, it puts on command lines."""
    place, hosts, environment = start.place, start.place.hosts, start.environment
    seen, secret = travelling(environment)
    if secret:
        print(
            f"note: {', '.join(sorted(secret))} stay here: --ssh={hosts.shell} would show them on command lines; keep "
            "them on the hosts (~/.aws/credentials, say), or use --ssh=ssh",
            file=sys.stderr,
        )
    for key in secret:
        if key.startswith(_SENT_BY_DEEPSPEED):
            del environment[key]
    seen |= {"DS_ACCELERATOR": place.device, "MASTER_ADDR": place.master, "MASTER_PORT": str(place.port)}
    seen |= {rank.TOKEN: place.token}
    variables = start.scratch / "environment"
    variables.write_text("".join(f"{key}={value}\n" for key, value in seen.items()))
    environment |= {"DS_ENV_FILE": str(variables), "PATH": with_python(environment.get("PATH", ""))}
    port = ["--ssh_port", str(hosts.ssh_port)] if hosts.ssh_port else []
    return [
        deepspeed_program(),
        *("--hostfile", str(hosts.hostfile), "--launcher", hosts.shell, "--force_multi", "--no_ssh_check"),
        *(*port, "--master_addr", place.master, "--master_port", str(place.port), "--log_level", "error"),
        *(rank.__file__, *start.arguments),  # a path: of some of its launchers `--module` makes a wrong command
    ]


def deepspeed_program() -> str:
    """The `deepspeed` command beside this Python."""
    program = Path(sys.executable).with_name("deepspeed")
    found = str(program) if program.exists() else shutil.which("deepspeed")
    if not found:
        raise GenattError(
            "the deepspeed launcher is not installed beside this Python: run `make setup`, or use --launcher torchrun"
        )
    return found


_COMMANDS: dict[str, Callable[[Start], list[str]]] = {
    "process": _process,
    "torchrun": _torchrun,
    "deepspeed": _deepspeed,
    "slurm": _slurm,
}
LAUNCHERS = (*_COMMANDS, "ray")
