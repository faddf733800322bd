"""Can this machine run genatt-dist, and if not, what mends it? (`genatt doctor`)

`examine()` returns one `Check` a line of the table. Packages are imported in child processes, so that a broken build
that kills its process is a failed line here, and this module itself imports none of them.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table

from genatt_dist.launch.launchers import worker_environment
from genatt_dist.launch.limits import available_cores, available_memory

GiB = 2**30
INSTALL = "run `make setup`"

# Imported in this order, one child process a row: torchrec imports fbgemm_gpu imports torch, and importing torch three
# times would be most of the waiting.
IMPORT_CHAINS = (("torch", "fbgemm_gpu", "torchrec"), ("deepspeed",), ("ray", "pyarrow"))
IMPORT_SECONDS = 120.0

# Reports through its own descriptor: packages print on stdout and stderr when they are imported.
_IMPORTER = """
import importlib, json, os, sys
out = os.fdopen(int(sys.argv[1]), "w", buffering=1)
for name in sys.argv[2:]:
    print(json.dumps({"try": name}), file=out)
    try:
        module = importlib.import_module(name)
        facts = {"error": None}
        if name == "torch":
            cuda = module.cuda.is_available()
            facts["cuda_build"] = module.version.cuda
            facts["gpus"] = [module.cuda.get_device_name(i) for i in range(module.cuda.device_count())] if cuda else []
    except BaseException as error:
        facts = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
    print(json.dumps({"name": name, **facts}), file=out)
out.flush()
os._exit(0)  # some of them keep threads that make the exit slow
"""


@dataclass(frozen=True)
class Check:
    """One line of the table. ok: None is a warning: training still works. mend: what to do, empty when ok."""

    name: str
    ok: bool | None
    found: str
    mend: str = ""


def examine(run_dir: Path = Path("runs")) -> list[Check]:
    """Every check, in the order of the table; a few seconds. run_dir: where runs will be written."""
    with ThreadPoolExecutor() as pool:  # the threads only wait for child processes
        imports = pool.submit(probe_imports)
        gpus = pool.submit(visible_gpus)
        name = pool.submit(check_hostname)
        first = [check_python()]
        later = [
            check_compiler(),
            check_cores(),
            check_threads(),
            check_memory(),
            check_shared_memory(),
            check_allocator(),
            check_loopback(),
            name.result(),
            check_writable("run directory", run_dir, warn_below=5 * GiB),
            check_writable("cache directory", cache_dir(), warn_below=1 * GiB),
            check_temporary(),
        ]
        facts = imports.result()
        return [*first, *check_packages(facts), check_fbgemm_build(facts), check_gpu(facts, gpus.result()), *later]


def print_table(checks: Iterable[Check], console: Console | None = None) -> None:
    """The checks as a table, with the mend under each line that has one."""
    mark = {True: "[green]ok[/]", None: "[yellow]warn[/]", False: "[red]fail[/]"}
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("", "check", "found"):
        table.add_column(column, overflow="fold")
    for check in checks:
        # Only the mark is markup: what was found may hold brackets.
        lines = [check.found, *([f"→ {check.mend}"] if check.mend else [])]
        table.add_row(mark[check.ok], check.name, "\n".join(lines).replace("[", r"\["))
    (console or Console()).print(table)


# --- Python and packages ----------------------------------------------------------------------------------------------


def check_python() -> Check:
    """3.11 or 3.12: torchrec and fbgemm have no wheels for others at these pins."""
    found = f"{platform.python_version()} ({sys.executable})"
    if (3, 11) <= sys.version_info[:2] <= (3, 12):
        return Check("Python", True, found)
    return Check("Python", False, found, "make the environment with 3.11 or 3.12: make setup PYTHON=python3.11")


def pins() -> dict[str, str]:
    """Distribution → version, for what genatt-dist requires exactly (extras too). Empty when it is not installed."""
    try:
        required = importlib.metadata.requires("genatt-dist") or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    exact = (re.match(r"([\w.-]+)(?:\[[^]]*\])?\s*==\s*([\w.]+)", line) for line in required)
    return {match[1].lower(): match[2] for match in exact if match}


def installed_version(distribution: str) -> str | None:
    """Version of an installed distribution without its build label (2.13.0+cpu is 2.13.0), or None."""
    try:
        return importlib.metadata.version(distribution).partition("+")[0]
    except importlib.metadata.PackageNotFoundError:
        return None


def fbgemm_distribution() -> str:
    """Which of the two distributions provides the package `fbgemm_gpu` here."""
    return "fbgemm-gpu-cpu" if installed_version("fbgemm-gpu-cpu") else "fbgemm-gpu"


def probe_imports() -> dict[str, dict]:
    """Module → what importing it gave: {"error": None or text, and for torch "cuda_build" and "gpus"}."""
    with ThreadPoolExecutor() as pool:
        return {name: facts for chain in pool.map(_probe_chain, IMPORT_CHAINS) for name, facts in chain.items()}


def _probe_chain(chain: tuple[str, ...], seconds: float | None = None) -> dict[str, dict]:
    seconds = seconds or IMPORT_SECONDS
    read, write = os.pipe()
    command = [sys.executable, "-c", _IMPORTER, str(write), *chain]
    child = subprocess.Popen(
        command, pass_fds=[write], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    os.close(write)
    try:
        code = child.wait(seconds)
        end = f"killed by signal {-code}" if code < 0 else f"exit status {code}"
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
        end = f"not done after {seconds:.0f} s"
    with os.fdopen(read) as report:
        lines = [json.loads(line) for line in report]
    facts = {line.pop("name"): line for line in lines if "name" in line}
    tried = [line["try"] for line in lines if "try" in line]
    culprit = next((name for name in tried if name not in facts), chain[0])
    for name in chain:
        facts.setdefault(
            name, {"error": end if name == culprit else f"not reached: importing {culprit} ended with {end}"}
        )
    return facts


def check_packages(facts: dict[str, dict]) -> list[Check]:
    """The versions that must match each other, and whether each package can be imported."""
    pinned = pins()
    if not pinned:
        return [Check("genatt-dist", False, "not installed in this environment", INSTALL)]
    checks = []
    for module, result in facts.items():
        distribution = fbgemm_distribution() if module == "fbgemm_gpu" else module
        version, wanted = installed_version(distribution), pinned[distribution]
        if version is None:
            checks.append(Check(distribution, False, "not installed", INSTALL))
        elif version != wanted:
            checks.append(Check(distribution, False, f"{version}, but {wanted} is required", INSTALL))
        elif result["error"]:
            mend = f"see the whole error with `python -c 'import {module}'`; reinstall with `make setup`"
            checks.append(Check(distribution, False, f"{version}, but the import failed: {result['error']}", mend))
        else:
            checks.append(Check(distribution, True, version))
    return checks


def check_fbgemm_build(facts: dict[str, dict]) -> Check:
    """fbgemm's CPU build holds no CUDA kernels, and its CUDA build does not load with a CPU torch."""
    torch_build = facts["torch"].get("cuda_build")
    has_cuda = fbgemm_distribution() == "fbgemm-gpu"
    found = f"fbgemm for {'CUDA' if has_cuda else 'CPU'}, torch for {f'CUDA {torch_build}' if torch_build else 'CPU'}"
    if facts["torch"]["error"]:
        return Check("builds", False, "unknown: torch cannot be imported", INSTALL)
    if has_cuda and not torch_build:
        return Check("builds", False, found, "the two must match: run `make setup DEVICE=cpu` (or DEVICE=cuda)")
    if not has_cuda and facts["torch"]["gpus"]:
        return Check("builds", False, f"{found}: sharded tables cannot use the GPU", "run `make setup DEVICE=cuda`")
    return Check("builds", True, found)


def visible_gpus() -> list[str]:
    """Names of the GPUs the driver lists, whatever torch sees."""
    output = _output(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], seconds=10)
    return output.splitlines() if output else []


def check_gpu(facts: dict[str, dict], gpus: list[str]) -> Check:
    """GPUs torch can use, or that there is none to use."""
    seen, build = facts["torch"].get("gpus") or [], facts["torch"].get("cuda_build")
    if seen:
        names = ", ".join(f"{seen.count(name)} × {name}" for name in dict.fromkeys(seen))
        return Check("GPU", True, f"{names} (CUDA {build})")
    if gpus:
        found = f"the driver lists {', '.join(gpus)}, torch sees none"
        if build is None:
            return Check("GPU", False, f"{found}: it is a CPU build", "run `make setup DEVICE=cuda`")
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
        mend = f"the driver may be too old for CUDA {build}; compare with `nvidia-smi`"
        return Check("GPU", False, found, f"unset CUDA_VISIBLE_DEVICES={hidden}" if hidden is not None else mend)
    return Check("GPU", True, "none: trains on the CPU with gloo")


def check_compiler() -> Check:
    """g++ and ninja: DeepSpeed compiles its own optimizers (CPUAdam, FusedAdam, offload) when they are first used."""
    # ninja comes as a Python package too, and its program then lies beside the interpreter, not on PATH.
    beside = Path(sys.executable).with_name("ninja")
    missing = [name for name in ("g++", "ninja") if not (shutil.which(name) or (name == "ninja" and beside.exists()))]
    if missing:
        mend = "only DeepSpeed's compiled optimizers need them: install build-essential and ninja-build"
        return Check("compiler", None, f"no {' and no '.join(missing)}", mend)
    return Check("compiler", True, "g++, ninja")


# --- processor and memory ---------------------------------------------------------------------------------------------


def check_cores() -> Check:
    """One rank needs a core of its own."""
    cores = available_cores()
    found = f"{cores:g} of {os.cpu_count()}"
    if cores < 1:
        return Check("cores", None, found, "raise the container's CPU limit to at least one core a rank")
    return Check("cores", True, found)


def check_threads() -> Check:
    """OMP_NUM_THREADS: every rank starts so many threads, and more than cores slows all of them."""
    value, cores = os.environ.get("OMP_NUM_THREADS"), max(1, int(available_cores()))
    if value is None:
        return Check("OMP_NUM_THREADS", True, f"unset: launchers divide {cores} among the ranks")
    if not value.isdigit() or int(value) < 1:
        return Check("OMP_NUM_THREADS", False, repr(value), f"set it to a whole number from 1 to {cores}, or unset it")
    if int(value) > cores:
        return Check("OMP_NUM_THREADS", None, f"{value}, but {cores} cores", "set it to cores divided by ranks")
    return Check("OMP_NUM_THREADS", True, value)


def check_memory() -> Check:
    """Each rank holds torch, Ray's client and its part of the tables."""
    total, free = available_memory(), psutil.virtual_memory().available
    found = f"{_size(total)}, {_size(min(free, total))} free"
    if min(free, total) < 2 * GiB:
        return Check(
            "memory", None, found, "end other programs, or lower training.batch_sequences and the number of ranks"
        )
    return Check("memory", True, found)


def check_shared_memory(path: str = "/dev/shm") -> Check:
    """Ray's object store and DataLoader workers live in /dev/shm; Ray asks for 30 % of the memory there."""
    try:
        total = shutil.disk_usage(path).total
    except OSError:
        return Check("shared memory", None, f"no {path}: Ray's object store goes to a slow disk", "mount a tmpfs there")
    wanted = max(2 * GiB, int(0.3 * available_memory()))
    if total < wanted:
        mend = (
            f"give the container more: docker run --shm-size={-(-wanted // GiB)}g, or a Memory emptyDir in Kubernetes"
        )
        return Check("shared memory", None, f"{_size(total)} in {path}, less than {_size(wanted)}", mend)
    return Check("shared memory", True, f"{_size(total)} in {path}")


def check_allocator() -> Check:
    """glibc gives large buffers back to the kernel every step unless told otherwise, which makes CPU steps slow."""
    preloaded = re.search(r"jemalloc|tcmalloc|mimalloc", os.environ.get("LD_PRELOAD", ""))
    if preloaded:
        return Check("allocator", True, f"{preloaded[0]}, preloaded")
    if platform.libc_ver()[0] != "glibc":
        return Check("allocator", True, f"{platform.system()}'s own")
    # Launchers keep what the user has set, so a setting from elsewhere reaches the ranks.
    wanted = {name: value for name, value in worker_environment({}, 1).items() if name.startswith("MALLOC_")}
    other = {name: os.environ[name] for name, value in wanted.items() if os.environ.get(name, value) != value}
    if other:
        found = "glibc with " + ", ".join(f"{name}={value}" for name, value in other.items())
        return Check(
            "allocator", None, found, f"for faster steps: unset {' '.join(other)}, our launchers set what works"
        )
    return Check("allocator", True, "glibc, told by our launchers to keep large buffers")


# --- network and disk -------------------------------------------------------------------------------------------------


def check_loopback(address: str = "127.0.0.1") -> Check:
    """Ranks of one machine meet over loopback TCP."""
    try:
        with socket.create_server((address, 0)) as server:
            port = server.getsockname()[1]
            with socket.create_connection((address, port), timeout=2):
                return Check("loopback", True, f"{address} accepts connections")
    except OSError as error:
        mend = "bring the interface `lo` up, or let the sandbox or firewall allow connections to it"
        return Check("loopback", False, f"{address}: {error}", mend)


def check_hostname(seconds: float = 5) -> Check:
    """gloo listens on the address that the machine's own name resolves to, if that address is its own."""
    name = socket.gethostname()
    # In a child process: the resolver has no time limit of its own.
    code = "import socket as s; a = s.gethostbyname(s.gethostname()); s.socket().bind((a, 0)); print(a)"
    address = _output([sys.executable, "-I", "-S", "-c", code], seconds)
    if address:
        return Check("host name", True, f"{name} is {address}")
    mend = f"add `127.0.0.1 {name}` to /etc/hosts, or name the interface: export GLOO_SOCKET_IFNAME=lo (or eth0, …)"
    return Check("host name", None, f"{name} does not resolve to an address of this machine", mend)


def cache_dir() -> Path:
    """Where data_pipeline.known keeps downloads, found without importing it: a doctor works in a broken environment."""
    own, shared = os.environ.get("GENATT_CACHE"), os.environ.get("XDG_CACHE_HOME")
    return Path(own) if own else Path(shared or Path.home() / ".cache") / "genatt"


def check_writable(name: str, path: Path, warn_below: int) -> Check:
    """path, or the directory it would be made in, takes files and has room. Creates nothing that stays."""
    path = path.absolute()
    there = next(parent for parent in (path, *path.parents) if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            free = shutil.disk_usage(there).free
    except OSError as error:
        return Check(name, False, f"{path}: {error.strerror or error}", "make it writable, or choose another one")
    found = f"{path}, {_size(free)} free"
    if free < warn_below:
        return Check(name, None, found, f"free some space: {_size(warn_below)} are safe")
    return Check(name, True, found)


def check_temporary() -> Check:
    """Ray keeps its session, and spills objects, in the temporary directory."""
    try:
        return check_writable("temporary directory", Path(tempfile.gettempdir()), warn_below=2 * GiB)
    except FileNotFoundError as error:  # gettempdir() found none that takes a file
        return Check("temporary directory", False, str(error), "export TMPDIR=<a directory you can write>")


# --- helpers ----------------------------------------------------------------------------------------------------------


def _output(command: list[str], seconds: float) -> str | None:
    """What a command prints, or None where it is missing, fails or takes too long."""
    try:
        return subprocess.check_output(
            command, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL, text=True, timeout=seconds
        ).strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _size(count: int) -> str:
    return f"{count / GiB:.1f} GiB"
