"""What a stopped run leaves for who started it: RUN/stopped.json. Nothing heavy is imported: a signal may come early.

{"reason", "step": updates done, "epoch": under way, from 0, "checkpoint": step of the newest complete one, or null,
 "time": seconds since 1970, "rank": who says so}
"""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress
from pathlib import Path

from data_pipeline.errors import ResumableError

STOPPED = "stopped.json"
_ROOT_SECONDS = 4.0  # other ranks give rank 0 so long to say it


class StoppedError(ResumableError):
    """All ranks stopped after the same step, as they were asked to; rank 0 speaks for all."""


def write_stopped(run: Path, reason: str, step: int, epoch: int | None, checkpoint: int | None, rank: int = 0) -> None:
    """Say why the run stopped. step: updates done; epoch: from 0, None where it is not known; checkpoint: the newest's
    step.

    Of ranks that see different things (a link is cut, and each misses the other) rank 0 is believed: it replaces what
    others said, and they wait a few seconds for it. Otherwise what was said first stays.
    """
    facts = {"reason": reason, "step": step, "epoch": epoch, "checkpoint": checkpoint, "time": round(time.time(), 3)}
    place, temporary = run / STOPPED, run / f".{STOPPED}.{rank}.{os.getpid()}"  # containers' pids are alike
    deadline = time.monotonic() + (_ROOT_SECONDS if rank else 0.0)
    with suppress(OSError):  # this host cannot write there: what is printed has to do
        while not place.exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        if not place.exists() or (rank == 0 and _said_by(place) != 0):
            temporary.write_text(json.dumps(facts | {"rank": rank}, indent=2))
            temporary.rename(place)


def _said_by(place: Path) -> int | None:
    with suppress(ValueError, TypeError):
        rank: int | None = json.loads(place.read_text()).get("rank")
        return rank
    return None


def advice(checkpoint: int | None) -> str:
    """How to go on."""
    if checkpoint is None:
        return "there is no checkpoint yet: run it again"
    return f"go on from the checkpoint of step {checkpoint} by the same command with --resume"
