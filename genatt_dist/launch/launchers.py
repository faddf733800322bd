"""The same worker under three launchers: a single process, torchrun, or the deepspeed launcher.

`launch` starts it with the allocator and thread settings it needs, passes signals on, and ends the whole process group
it made. Where it is killed outright, the kernel ends what it had started, and workers watch it (`launch/orphan.py`).
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from data_pipeline.errors import GenattError
from genatt_dist.launch.limits import available_cores
from genatt_dist.launch.orphan import LAUNCHER_PID

_WORKER = "genatt_dist.launch.worker"
_GRACE_SECONDS = 10
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def device_type(world_size: int) -> str:
    """Where ranks started from here run: `cuda` where each has a GPU of its own, else `cpu`; DS_ACCELERATOR decides
    where it is set.
    """
    import torch

    return os.environ.get("DS_ACCELERATOR", "cuda" if torch.cuda.device_count() >= world_size else "cpu")


def launch(run: Path, launcher: str, world_size: int, resume: bool = False) -> None:
    """Run the workers of `run` to their end. Raises GenattError when they fail or cannot be started."""
    import torch  # here, not above: `genatt --help` answers without it

    # The directory has no option of its own: torchrun would take `--run` for an abbreviation of its `--run-path`.
    arguments = [str(run), "--launcher", launcher, *(["--resume"] if resume else [])]
    environment = worker_environment(os.environ, world_size) | {LAUNCHER_PID: str(os.getpid())}
    if "DS_ACCELERATOR" not in environment:
        environment["DS_ACCELERATOR"] = device_type(world_size)
        if 0 < (gpus := torch.cuda.device_count()) < world_size:
            print(f"note: {world_size} ranks on the CPU: {gpus} GPU(s) are here, and a rank needs one", file=sys.stderr)
    process = subprocess.Popen(
        _COMMANDS[launcher](world_size, arguments, environment),
        env=environment,
        start_new_session=True,
        preexec_fn=_ends_with_parent(),
    )
    try:
        with _sigterm_raises():
            code = process.wait()
    except BaseException:
        _end(process)
        raise
    if code:
        raise GenattError(
            f"training in {run} ended with exit code {code} under launcher={launcher}; its messages are above"
        )


def _ends_with_parent() -> Callable[[], None] | None:
    """For a child to call before it becomes its program: it gets SIGTERM when this process is gone, however it went.

    SIGTERM and not SIGKILL, so that torchrun and deepspeed end their ranks too. None where the kernel is not Linux.
    """
    if sys.platform != "linux":
        return None
    libc, parent = ctypes.CDLL(None), os.getpid()  # loaded here: a forked child should do as little as possible

    def ask() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        if os.getppid() != parent:  # gone before the kernel was asked
            os._exit(1)

    return ask


@contextmanager
def _sigterm_raises() -> Iterator[None]:
    """A plain `kill` of this process would leave the workers behind; as an exception it ends them too."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread may ask for signals
        yield
        return
    previous = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def check_launcher(launcher: str, world_size: int) -> None:
    """Whether there is such a launcher and it can start so many ranks."""
    if launcher not in LAUNCHERS:
        raise GenattError(f"launcher={launcher} is unknown: use {', '.join(LAUNCHERS)}")
    if launcher == "process" and world_size > 1:
        raise GenattError(f"launcher=process runs one rank, but world_size={world_size}: use torchrun or deepspeed")


def worker_environment(base: os._Environ[str] | dict[str, str], world_size: int) -> dict[str, str]:
    """The environment of the workers: cores shared out, and an allocator that keeps large buffers.

    glibc gives large blocks back to the kernel after every step and takes them again in the next; here it keeps them
    (docs/architecture.md). What the user has set stays.
    """
    defaults = {
        "OMP_NUM_THREADS": str(max(1, int(available_cores()) // world_size)),
        "MALLOC_MMAP_MAX_": "0",
        "MALLOC_TRIM_THRESHOLD_": str(16 << 30),
        "MALLOC_TOP_PAD_": str(256 << 20),
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }
    return {**defaults, **base}


def single_process() -> dict[str, str]:
    """What a launcher would say to the one rank of a world of one."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    return {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"} | address


def _process(world_size: int, arguments: list[str], environment: dict[str, str]) -> list[str]:
    if world_size != 1:
        raise GenattError(
            f"launcher=process runs one rank, but world_size={world_size}: use --launcher torchrun or deepspeed"
        )
    environment.update(single_process())
    return [sys.executable, "-m", _WORKER, *arguments]


def _torchrun(world_size: int, arguments: list[str], environment: dict[str, str]) -> list[str]:
    rendezvous = ["--master-addr", "127.0.0.1", "--master-port", str(_free_port())]
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        str(world_size),
        *rendezvous,
        "-m",
        _WORKER,
        *arguments,
    ]


def _deepspeed(world_size: int, arguments: list[str], environment: dict[str, str]) -> list[str]:
    program = Path(sys.executable).with_name("deepspeed")
    found = str(program) if program.exists() else shutil.which("deepspeed")
    if not found:
        raise GenattError(
            "the deepspeed launcher is not installed beside this Python: run `make setup`, or use --launcher torchrun"
        )
    environment["PATH"] = (
        f"{Path(sys.executable).parent}{os.pathsep}{environment.get('PATH', '')}"  # it starts `python`
    )
    address = ["--master_addr", "127.0.0.1", "--master_port", str(_free_port())]
    # Given a number, the launcher overrides CUDA_VISIBLE_DEVICES; given places, it keeps to them.
    visible = environment.get("CUDA_VISIBLE_DEVICES", "") if environment.get("DS_ACCELERATOR") == "cuda" else ""
    gpus = visible.split(",")[:world_size] if visible else []
    if not all(gpu.isdigit() for gpu in gpus) or 0 < len(gpus) < world_size:
        raise GenattError(
            f"CUDA_VISIBLE_DEVICES={visible} does not number {world_size} GPUs, which the deepspeed launcher needs: "
            "use --launcher torchrun"
        )
    places = ["--include", "localhost:" + ",".join(gpus)] if gpus else []
    ranks = places or ["--num_accelerators", str(world_size)]
    return [found, *ranks, *address, "--log_level", "error", "--module", _WORKER, *arguments]


_COMMANDS: dict[str, Callable[[int, list[str], dict[str, str]], list[str]]] = {
    "process": _process,
    "torchrun": _torchrun,
    "deepspeed": _deepspeed,
}
LAUNCHERS = tuple(_COMMANDS)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the launcher and all it started: politely, then for certain."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, sign)
            process.wait(_GRACE_SECONDS)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue
