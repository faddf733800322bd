"""What `genatt_dist.launch.ssh` runs on each host: it starts the ranks there, and none outlives its connection."""

from __future__ import annotations

import io
import json
import os
import select
import socket
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

from data_pipeline.errors import GenattError
from genatt_dist.launch.environment import between_hosts, with_python, worker_environment
from genatt_dist.launch.group import STOP, Group
from genatt_dist.launch.launchers import deepspeed_program
from genatt_dist.launch.meeting import check_seen
from genatt_dist.launch.orphan import LAUNCHER_PID


def main() -> None:
    """Take the order from standard input, run the ranks, and end with the launcher's exit code."""
    told = io.FileIO(0)
    order: dict[str, Any] = json.loads(told.readline())
    name = list(order["hosts"])[order["node"]]
    try:
        check_seen(Path(order["arguments"][0]), order["token"], name)
        program = deepspeed_program()
    except GenattError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(error.exit_code)
    ended = threading.Event()
    threading.Thread(target=_listen, args=(told, order["silence_seconds"], ended), daemon=True).start()
    with tempfile.TemporaryDirectory(prefix="genatt-") as scratch:
        hostfile = Path(scratch) / "hostfile"
        hostfile.write_text("".join(f"{host} slots={slots}\n" for host, slots in order["hosts"].items()))
        command = [
            *(program, "--hostfile", str(hostfile), "--no_ssh", "--node_rank", str(order["node"])),
            *("--master_addr", order["master"], "--master_port", str(order["port"])),
            *("--log_level", "error", "--module", order["worker"], *order["arguments"]),
        ]
        group = Group(command, _environment(order, order["hosts"][name]))
        try:
            code = group.wait(lambda: STOP if ended.is_set() else 0, order["stop_seconds"])
        finally:
            group.kill()
    sys.exit(code if code >= 0 else 128 - code)


def _environment(order: dict[str, Any], slots: int) -> dict[str, str]:
    """This host's own, what came along, and what is counted here."""
    base = os.environ | order["environment"]
    base |= {"LOCAL_WORLD_SIZE": str(slots), LAUNCHER_PID: str(os.getpid()), "PATH": with_python(base.get("PATH", ""))}
    return between_hosts(worker_environment(base, slots), order["master"])


def _listen(told: io.FileIO, silence_seconds: float, ended: threading.Event) -> None:
    """Until there is a word to stop, the connection ends, or no sign of life has come for too long."""
    while select.select([told], [], [], silence_seconds)[0]:
        words = told.read(4096)
        if not words or b"S" in words:
            break
    else:
        print(
            f"host {socket.gethostname()}: no sign of life from the launcher for {silence_seconds:.0f} s",
            file=sys.stderr,
        )
    ended.set()


if __name__ == "__main__":
    main()
