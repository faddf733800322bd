"""RUN/heartbeat.json: where every rank of a run stands, renewed every few seconds by rank 0; and who looks at it.

    python -m genatt_dist.training.heartbeat RUN --max-age 60

ends with 0 while the file is at most so many seconds old, and with 1 (and a line that says why) when it is older, or
not there. It imports nothing beyond the standard library (0.05 s), so Kubernetes can run it as a liveness probe:

    livenessProbe:
      exec: {command: [python, -m, genatt_dist.training.heartbeat, /runs/NAME, --max-age, "60"]}
      periodSeconds: 20

A run writes the file from the moment its ranks have found each other; for the time before, a probe needs a startup
probe of the same command, or an initial delay. Only a host that sees the run directory can ask.

    {"time": seconds since 1970, "step": …, "epoch": …, "operation": "backward",
     "ranks": [{"rank": 0, "host": …, "pid": …, "step": …, "epoch": …, "operation": …, "seconds": in that operation,
                "silent": seconds without a sign of life, "ended": null or how it ended}, …]}

of rank 0 and of each rank. Steps are counted from 1, and the one named is under way.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

HEARTBEAT = "heartbeat.json"


def write(run: Path, facts: Mapping[str, Any]) -> None:
    """Replace the file of `run` atomically; the time is added. Raises OSError."""
    temporary = run / f".{HEARTBEAT}.{os.getpid()}"
    temporary.write_text(json.dumps({"time": round(time.time(), 3), **facts}))
    temporary.rename(run / HEARTBEAT)


def age(run: Path) -> float:
    """Seconds since the last beat. Raises OSError where there is none, ValueError where it is none of ours."""
    beat = json.loads((run / HEARTBEAT).read_text())
    try:
        return max(0.0, time.time() - float(beat["time"]))
    except (KeyError, TypeError) as error:
        raise ValueError(f"no time in it: {error}") from None


def main(arguments: list[str] | None = None) -> int:
    """The probe: its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m genatt_dist.training.heartbeat", description="Whether a run is alive."
    )
    parser.add_argument("run", type=Path, help="Run directory.")
    parser.add_argument("--max-age", type=float, default=60.0, metavar="SECONDS", help="Older is dead (default 60).")
    options = parser.parse_args(arguments)
    try:
        found = age(options.run)
    except (OSError, ValueError) as error:
        print(f"{options.run / HEARTBEAT} cannot be read: {error}", file=sys.stderr)
        return 1
    if found > options.max_age:
        print(f"{options.run / HEARTBEAT} is {found:.0f} s old, more than {options.max_age:.0f} s", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
