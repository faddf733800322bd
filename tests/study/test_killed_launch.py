"""A process that trains and is killed outright takes its worker with it."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

# The worker is one that would sleep; torch, which `launch` asks for GPUs only, is left out.
_LAUNCH = """
import os, sys, types
sys.modules["torch"] = types.ModuleType("torch")
os.environ["DS_ACCELERATOR"] = "cpu"
from pathlib import Path
from genatt_dist.launch import launchers
worker = "import os, sys, time; open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(60)"
launchers._COMMANDS["process"] = lambda world_size, arguments, environment: [sys.executable, "-c", worker, sys.argv[1]]
launchers.launch(Path("run"), "process", 1)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="asks the kernel of Linux")
def test_worker_ends_with_its_killed_parent(tmp_path: Path) -> None:
    path = tmp_path / "pid"
    parent = subprocess.Popen([sys.executable, "-c", _LAUNCH, str(path)])
    try:
        assert _comes(lambda: path.exists() and path.read_text() != "")
        worker = psutil.Process(int(path.read_text()))
        assert worker.ppid() == parent.pid
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    assert _comes(lambda: not psutil.pid_exists(worker.pid) or worker.status() == psutil.STATUS_ZOMBIE)


def _comes(sign: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 30
    while not sign() and time.monotonic() < deadline:
        time.sleep(0.02)
    return sign()
