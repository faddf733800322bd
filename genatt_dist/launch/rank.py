"""A rank that the deepspeed launcher started on another host by pdsh or MPI: its place in torch's words, its host's
environment; then it becomes the worker. Run by its path, with the worker's arguments.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from data_pipeline.errors import GenattError
from genatt_dist.launch.environment import between_hosts, with_python, worker_environment
from genatt_dist.launch.meeting import check_seen
from genatt_dist.launch.orphan import LAUNCHER_PID

TOKEN = "GENATT_START_TOKEN"
_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
# The same as Open MPI says it, MPICH and Intel MPI, and deepspeed's launcher. MPI's come first: MPICH's way sets
# WORLD_SIZE too.
_WORDS = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE"),
)


def place(environment: Mapping[str, str]) -> dict[str, str]:
    """RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE of this process."""
    for words in _WORDS:
        if all(word in environment for word in words):
            return {name: environment[word] for name, word in zip(_NAMES, words, strict=True)}
    raise GenattError("no launcher's variables tell this rank its place: use --ssh=ssh or --ssh=pdsh")


def main() -> None:
    """Become the worker."""
    # The deepspeed launcher's own word, which pdsh's way adds, may come first; the run directory is the first other.
    arguments = [word for word in sys.argv[1:] if not word.startswith("--local_rank")]
    try:
        own = place(os.environ)
        check_seen(Path(arguments[0]), os.environ[TOKEN], os.uname().nodename)
    except GenattError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(error.exit_code)
    base = {key: value for key, value in os.environ.items() if key not in (TOKEN, LAUNCHER_PID)} | own
    base["PATH"] = with_python(base.get("PATH", ""))
    environment = between_hosts(worker_environment(base, int(own["LOCAL_WORLD_SIZE"])), base["MASTER_ADDR"])
    os.execve(sys.executable, [sys.executable, "-m", "genatt_dist.launch.worker", *arguments], environment)


if __name__ == "__main__":
    main()
