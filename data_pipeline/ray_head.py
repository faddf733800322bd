"""A Ray on this machine, in a process of its own: `python -m data_pipeline.ray_head OPTIONS`.

Ray ends the process that starts it, with exit code 1 and without an exception, when its own processes fail on the way
up. Here that process is not the user's: the start is tried again, and told in one line where it never succeeds.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from typing import Any, ClassVar

from data_pipeline.errors import GenattError
from data_pipeline.storage import one_line

ATTEMPTS = 3
START_SECONDS = 300.0  # on a machine whose cores are all busy it took over two minutes
END_SECONDS = 20.0
PROGRAM = (sys.executable, "-m", "data_pipeline.ray_head")
_UP = "Ray is up at "


class RayHead:
    """A Ray that runs until `end`, or until the process that started it is gone."""

    running: ClassVar[RayHead | None] = None  # the one this process has started

    def __init__(self, options: Mapping[str, Any], environment: Mapping[str, str]) -> None:
        """options: of `ray.init`. environment: of all of Ray's processes. Raises GenattError: Ray cannot start."""
        for _ in range(ATTEMPTS):
            with tempfile.TemporaryFile("w+") as said:
                self._process = subprocess.Popen(
                    [*PROGRAM, json.dumps(dict(options))],
                    env=dict(environment) | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=said,
                    text=True,
                    start_new_session=True,  # Ctrl-C is for us: we end it in order
                )
                try:
                    address = self._address()
                except BaseException:  # Ctrl-C: it may still be on its way up
                    self.end()
                    raise
                if address:
                    self.address, RayHead.running = address, self
                    return
                self.end()
                said.seek(0)
                lines = [" ".join(line.split()) for line in said.read().splitlines() if line.strip()]
        why = lines[-1] if lines else f"its process ended with code {self._process.returncode}"
        raise GenattError(f"Ray cannot start: {why}: end other Ray processes or free memory and disk, then try again")

    def _address(self) -> str | None:
        """What it says once it is up; None when it ends or takes too long."""
        limit = threading.Timer(START_SECONDS, self._process.kill)
        limit.start()
        try:
            assert self._process.stdout is not None
            said = (line for line in self._process.stdout if line.startswith(_UP))
            return next(said, "").removeprefix(_UP).strip() or None
        finally:
            limit.cancel()

    def end(self) -> None:
        """End it and all of its processes."""
        RayHead.running = None
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.close()
            self._process.wait(END_SECONDS)
        except (OSError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()


def main() -> None:
    """Be that process: stand until stdin is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    import ray

    try:
        context = ray.init(address="local", log_to_driver=False, logging_level="ERROR", **json.loads(sys.argv[1]))
    except Exception as error:  # ray raises half a dozen kinds here
        sys.exit(one_line(error))
    print(f"{_UP}{context.address_info['gcs_address']}", flush=True)
    sys.stdin.read()
    ray.shutdown()


if __name__ == "__main__":
    main()
