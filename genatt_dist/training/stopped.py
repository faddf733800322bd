"""What a stopped run leaves for who started it: RUN/stopped.json. Nothing heavy is imported: a signal may come early.

{"reason", "step": updates done, "epoch": under way, from 0, "checkpoint": step of the newest complete one, or null,
 "time": seconds since 1970}
"""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress
from pathlib import Path

from data_pipeline.errors import ResumableError

STOPPED = "stopped.json"


class StoppedError(ResumableError):
    """All ranks stopped after the same step, as they were asked to; rank 0 speaks for all."""


def write_stopped(run: Path, reason: str, step: int, epoch: int, checkpoint: int | None) -> None:
    """Say why the run stopped, unless a rank has said so already. step: updates done; checkpoint: the newest's step."""
    facts = {"reason": reason, "step": step, "epoch": epoch, "checkpoint": checkpoint, "time": round(time.time(), 3)}
    temporary = run / f".{STOPPED}.{os.getpid()}"
    with suppress(OSError):  # this host cannot write there: what is printed has to do
        if not (run / STOPPED).exists():
            temporary.write_text(json.dumps(facts, indent=2))
            temporary.rename(run / STOPPED)


def advice(checkpoint: int | None) -> str:
    """How to go on."""
    if checkpoint is None:
        return "there is no checkpoint yet: run it again"
    return f"go on from the checkpoint of step {checkpoint} by the same command with --resume"
