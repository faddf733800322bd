"""No worker trains on unseen: it ends when the process that ordered it is gone, however it went.

The kernel tells a child only of its own parent's end, and the deepspeed launcher puts processes between that outlive a
SIGKILL of those above them. So the worker itself waits for the one that launched it.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Mapping
from contextlib import suppress

import psutil

from genatt_dist.training import preemption

LAUNCHER_PID = "GENATT_LAUNCHER_PID"  # set for workers on the same machine


def end_with_launcher(environment: Mapping[str, str] = os.environ) -> None:
    """Watch the process that `environment` names, if any: once it is gone, this one gets SIGTERM (a worker then stops
    as for any other: with a checkpoint).
    """
    if LAUNCHER_PID not in environment:
        return
    pid = int(environment[LAUNCHER_PID])

    def watch() -> None:
        with suppress(psutil.NoSuchProcess):
            psutil.Process(pid).wait()
        preemption.request("the end of what launched it")
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="launcher-watch", daemon=True).start()
