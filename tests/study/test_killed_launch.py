"""A process that trains and is killed outright takes its worker with it."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from genatt_dist.launch.orphan import LAUNCHER_PID

# The worker is one that would sleep; torch, which `launch` asks for GPUs only, is left out.
_LAUNCH = """
import os, sys, types
sys.modules["torch"] = types.ModuleType("torch")
os.environ["DS_ACCELERATOR"] = "cpu"
from pathlib import Path
from genatt_dist.launch import launchers
from genatt_dist.launch.hosts import Hosts
from genatt_dist.launch.places import Place
from genatt_dist.training.options import TrainingConfig
worker = "import os, sys, time; open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(60)"
launchers._COMMANDS["process"] = lambda start: [sys.executable, "-c", worker, sys.argv[1]]
launchers.launch(Path("run"), "process", TrainingConfig(), Place(Hosts(), 1, "cpu"))
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


def test_worker_ends_with_a_launcher_that_is_not_its_parent(tmp_path: Path) -> None:
    launcher = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    script = (
        "import time; from genatt_dist.launch.orphan import end_with_launcher; end_with_launcher(); "
        "print('ready', flush=True); time.sleep(60)"
    )
    worker = subprocess.Popen(
        [sys.executable, "-c", script], env=os.environ | {LAUNCHER_PID: str(launcher.pid)}, stdout=subprocess.PIPE
    )
    try:
        assert worker.stdout is not None
        assert worker.stdout.readline() == b"ready\n"
        assert worker.poll() is None
        launcher.kill()
        launcher.wait()
        assert worker.wait(30) == -signal.SIGTERM
    finally:
        launcher.kill()
        worker.kill()
        worker.communicate()
        launcher.wait()


def _comes(sign: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 30
    while not sign() and time.monotonic() < deadline:
        time.sleep(0.02)
    return sign()
