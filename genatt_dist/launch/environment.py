"""The environment of workers: what they get on every host, and what goes along to other hosts."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from data_pipeline.errors import GenattError
from data_pipeline.redaction import redact
from genatt_dist.launch.limits import available_cores
from genatt_dist.launch.network import ELSEWHERE, interface_towards, is_loopback_name
from genatt_dist.launch.orphan import LAUNCHER_PID

# What a user sets for the ranks, by how the names begin: threads and allocator, networks, libraries, storage, trackers.
# Not what differs from host to host: CUDA_VISIBLE_DEVICES, PATH, HOME.
_TRAVEL = (
    *("OMP_", "KMP_", "MKL_", "MALLOC_", "LD_PRELOAD", "LD_LIBRARY_PATH"),
    *(
        "NCCL_",
        "GLOO_",
        "UCX_",
        "FI_",
        "HTTP_PROXY",
        "HTTPS_PROXY",
        "NO_PROXY",
        "http_proxy",
        "https_proxy",
        "no_proxy",
    ),
    *("TORCH_", "TRITON_", "PYTHON", "DS_ACCELERATOR", "GENATT_"),
    *("AWS_", "GOOGLE_", "AZURE_", "FSSPEC_", "MLFLOW_", "WANDB_"),
)
_SECRET = ("KEY", "SECRET", "TOKEN", "PASSWORD", "CREDENTIAL", "CONNECTION_STRING")
_OWN = {LAUNCHER_PID, "DS_ENV_FILE"}  # of this host alone


def worker_environment(base: Mapping[str, str], local_ranks: int) -> dict[str, str]:
    """The environment of the workers of one host: cores shared out, and an allocator that keeps large buffers.

    glibc gives large blocks back to the kernel after every step and takes them again in the next; here it keeps them
    (docs/architecture.md). What the user has set stays.
    """
    defaults = {
        "OMP_NUM_THREADS": str(max(1, int(available_cores()) // local_ranks)),
        "MALLOC_MMAP_MAX_": "0",
        "MALLOC_TRIM_THRESHOLD_": str(16 << 30),
        "MALLOC_TOP_PAD_": str(256 << 20),
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }
    return {**defaults, **base}


def with_python(path: str) -> str:
    """A PATH where this Python comes first: the deepspeed launcher starts `python`."""
    return f"{Path(sys.executable).parent}{os.pathsep}{path}"


def between_hosts(base: Mapping[str, str], master: str) -> dict[str, str]:
    """`base` and the interface gloo has to use: by itself it takes what the host's own name resolves to, which
    many distributions map to the loopback. On the first rank's own host that may be what `master` means too: there it
    is the interface of the way out.

    master: name or address of the first rank's host.
    """
    interface = interface_towards(master) or (None if is_loopback_name(master) else interface_towards(ELSEWHERE))
    return {**({"GLOO_SOCKET_IFNAME": interface} if interface else {}), **base}


def travelling(base: Mapping[str, str] = os.environ) -> tuple[dict[str, str], dict[str, str]]:
    """What goes along to other hosts: the variables that may be seen, and the secret ones, which only an encrypted
    connection may carry. What DeepSpeed's own `.deepspeed_env` files name is added to the first: their owner knows that
    DeepSpeed puts it on command lines.
    """
    chosen = {key: value for key, value in base.items() if key.startswith(_TRAVEL) and key not in _OWN}
    secret = {key: value for key, value in chosen.items() if _is_secret(key, value)}
    seen = {key: value for key, value in chosen.items() if key not in secret}
    for directory in (Path.home(), Path.cwd()):
        seen |= _assignments(directory / base.get("DS_ENV_FILE", ".deepspeed_env"))
    return seen, secret


def _is_secret(key: str, value: str) -> bool:
    """By its name, or because the value is a URL with a password, or options of a storage (FSSPEC_S3={"secret": …})."""
    return any(word in key.upper() for word in _SECRET) or redact(value) != value or value.lstrip().startswith("{")


def _assignments(path: Path) -> dict[str, str]:
    """KEY=VALUE lines of a file; none where there is none."""
    if not path.is_file():
        return {}
    pairs = {}
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if not (line := line.strip()) or line.startswith("#"):
            continue
        key, found, value = line.partition("=")
        if not found:
            raise GenattError(f"{path}, line {number}: not of the form KEY=VALUE: mend it or take it out")
        pairs[key.strip()] = value.strip()
    return pairs
