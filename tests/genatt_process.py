"""`genatt` in a process of its own, for tests of what becomes of it; it can stop inside a stage of a preparation.

As a program: `python genatt_process.py STAGE MARKER ARGUMENTS` is `genatt ARGUMENTS`, but each task of STAGE, a
function of `data_pipeline.tasks`, makes the file MARKER when it has done its work and waits, longer than any test does.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

WAIT_SECONDS = 300


@contextmanager
def genatt(
    *arguments: object, stop_at: str = "", marker: object = "", **environment: str
) -> Iterator[subprocess.Popen]:
    """`genatt` in a process group of its own, which stops at a stage if asked to; nothing of it is left afterwards."""
    program = [__file__, stop_at, marker] if stop_at else ["-m", "genatt_dist.cli"]
    command = [sys.executable, *program, *arguments]
    child = subprocess.Popen(
        [str(word) for word in command],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    family = []
    try:
        yield child
    finally:
        if child.poll() is None:
            family = psutil.Process(child.pid).children(recursive=True)
            child.kill()
        child.communicate()
        for process in family:
            if process.is_running():
                process.kill()


def wait_for(marker: Path, child: subprocess.Popen, seconds: float = 90) -> list[psutil.Process]:
    """Waits until `child` is at the stage where it stops; all processes it has started."""
    deadline = time.monotonic() + seconds
    while not marker.exists():
        assert child.poll() is None, child.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return psutil.Process(child.pid).children(recursive=True)


def left_after(family: list[psutil.Process], seconds: float) -> list[str]:
    """What still runs of `family` after some seconds; it does not afterwards."""
    _, alive = psutil.wait_procs(family, timeout=seconds)
    names = []
    for process in alive:
        with suppress(psutil.NoSuchProcess):
            if process.status() != psutil.STATUS_ZOMBIE:
                names.append(process.name())
                process.kill()
    return names


def slow(stage: str, marker: str) -> Callable[..., Any]:
    """The task, for workers that cannot import this file: what is defined in here is sent to them whole."""

    def wait() -> None:
        import time
        from pathlib import Path

        Path(marker).touch()
        time.sleep(WAIT_SECONDS)

    def read_block(*arguments: Any, **options: Any) -> Any:
        from data_pipeline import tasks

        yield from tasks.read_block(*arguments, **options)
        wait()

    def other(*arguments: Any) -> Any:
        from data_pipeline import tasks

        result = getattr(tasks, stage)(*arguments)
        wait()
        return result

    return read_block if stage == "read_block" else other


if __name__ == "__main__":
    from data_pipeline import prepare
    from genatt_dist.cli import main

    stage, marker, *arguments = sys.argv[1:]
    setattr(prepare.tasks, stage, slow(stage, marker))
    sys.argv = ["genatt", *arguments]
    main()
