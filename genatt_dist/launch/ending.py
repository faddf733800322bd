"""How a launch ended, by what its ranks left in the run directory: the exit codes of launchers tell too little.

- RUN/stopped.json: they stopped in order, or lost one of them and said so (training/stopped.py);
- RUN/failed.json: one of them met an error, a mistake of the user's or a bug: {"rank", "error": in one line, "time"};
- neither, though they had begun: they were killed (the only one, or all at once), or crashed below Python.

Workers import this before they hear signals: nothing heavy at the top.
"""

from __future__ import annotations

import json
import os
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipeline.errors import GenattError, ResumableError
from genatt_dist.training.heartbeat import HEARTBEAT
from genatt_dist.training.stopped import STOPPED

if TYPE_CHECKING:
    from genatt_dist.training.options import CheckpointConfig

FAILED = "failed.json"
# Of a worker, of its launcher (torchrun's here, a shell), and of the deepspeed launcher, which ends with the code -9.
_KILLED = (-signal.SIGKILL, 128 + signal.SIGKILL, 256 - signal.SIGKILL)
_WORDS = (STOPPED, HEARTBEAT, FAILED)


def forget(run: Path) -> None:
    """Remove what an earlier start left."""
    for word in _WORDS:
        (run / word).unlink(missing_ok=True)


def write_failed(run: Path, error: BaseException) -> None:
    """Say that this rank ends by an error of its own; what was said first stays."""
    rank = int(os.environ.get("RANK", "0"))
    told = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    place, temporary = run / FAILED, run / f".{FAILED}.{rank}.{os.getpid()}"
    with suppress(OSError):  # this host cannot write there: its exit code and messages have to do
        if not place.exists():
            temporary.write_text(json.dumps({"rank": rank, "error": told, "time": round(time.time(), 3)}, indent=2))
            temporary.rename(place)


def tell_stopped(run: Path) -> None:
    """Raise ResumableError where the ranks said that they stopped."""
    try:
        stopped: dict[str, Any] = json.loads((run / STOPPED).read_text())
        step, epoch = stopped["step"], stopped["epoch"]
        where = f"after step {step}" if epoch is None else f"after step {step} (epoch {epoch + 1})"
    except (OSError, ValueError, KeyError, TypeError):
        return
    raise ResumableError(f"{run} stopped {where}: {stopped.get('reason')}; {_how(run, stopped.get('checkpoint'))}")


def tell_killed(run: Path, code: int, checkpoint: CheckpointConfig) -> None:
    """Raise ResumableError where the ranks' launch ended with `code` and none of them said why.

    checkpoint: where the run's checkpoints lie.
    """
    begun = (run / HEARTBEAT).exists() or code in _KILLED
    if code in (0, GenattError.exit_code) or (run / FAILED).exists() or not begun:
        return
    from genatt_dist.training.checkpoint.store import Store  # here, not above: `genatt --help` answers without torch
    from genatt_dist.training.stopping import newest_checkpoint

    raise ResumableError(
        f"{run}: its ranks ended without a word (exit code {code}): killed, for lack of memory perhaps, or crashed; "
        f"{_how(run, newest_checkpoint(Store.of(run, checkpoint)))}"
    )


def _how(run: Path, checkpoint: int | None) -> str:
    """How to go on."""
    if checkpoint is None:
        return f"there is no checkpoint yet: begin afresh, with {run} removed if it is still there"
    return f"go on from the checkpoint of step {checkpoint} by the same command with --resume"
