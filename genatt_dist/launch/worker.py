"""What every launcher starts on every rank: `python -m genatt_dist.launch.worker DIR --launcher NAME [--resume]`.

Exit codes:
- 0: trained to the end;
- 2: a mistake of the user, told in one line (by rank 0 where all ranks meet it);
- 75: stopped from outside (SIGTERM, Ctrl-C, a notice of preemption), or another rank is lost or hangs: the same command
  with --resume goes on; DIR/stopped.json says why and from where;
- 1: another rank ended and says why, or a bug, which keeps its traceback;
- 130: a second Ctrl-C, which ends it at once.
Launchers have codes of their own, so a rank that ends by a mistake or a bug says so in DIR/failed.json too: ranks that
leave no word at all were killed, which is neither (launch/ending.py).
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
import warnings
from pathlib import Path

from data_pipeline.errors import GenattError, ResumableError
from genatt_dist.launch.ending import write_failed
from genatt_dist.launch.orphan import end_with_launcher
from genatt_dist.training.preemption import handle_signals
from genatt_dist.training.signs import is_lost_peer
from genatt_dist.training.stopped import StoppedError, write_stopped

_RANK_0_FIRST_SECONDS = 3


def main() -> None:
    """Train on this rank as the arguments say."""
    parser = argparse.ArgumentParser()
    parser.add_argument("run", type=Path)
    parser.add_argument("--launcher", required=True)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument(
        "--local_rank", type=int, default=0, help="given by the deepspeed launcher; LOCAL_RANK says the same"
    )
    arguments = parser.parse_args()
    handle_signals(lambda reason: _stop_early(arguments.run, arguments.resume, reason))
    end_with_launcher()
    quiet()
    from genatt_dist import config as configuration
    from genatt_dist.training.train import train

    rank = os.environ.get("RANK", "0")
    told = "error" if rank == "0" else f"error (rank {rank})"
    try:
        train(configuration.load(arguments.run / "config.yaml"), arguments.run, arguments.launcher, arguments.resume)
    except ResumableError as error:
        if rank == "0" or not isinstance(error, StoppedError):
            print(f"{told}: {error}", file=sys.stderr, flush=True)
        _leave(error.exit_code)
    except GenattError as error:
        write_failed(arguments.run, error)
        if rank != "0":
            # Mostly rank 0 says the same and the launcher ends this process meanwhile;
            # an error of this rank alone is told.
            time.sleep(_RANK_0_FIRST_SECONDS)
        print(f"{told}: {error}", file=sys.stderr, flush=True)
        sys.exit(error.exit_code)
    except Exception as error:
        if not (isinstance(error, RuntimeError) and is_lost_peer(error)):
            write_failed(arguments.run, error)
            raise
        # Before the watchdog is at work.
        print(f"rank {rank}: another rank ended; it says why", file=sys.stderr, flush=True)
        sys.exit(1)


def _stop_early(run: Path, resume: bool, reason: str) -> None:
    """Asked to stop before there is anything to save."""
    rank = int(os.environ.get("RANK", "0"))
    steps = [int(path.parent.name.removeprefix("step-")) for path in run.glob("checkpoints/step-*/COMPLETE")]
    if steps or not resume:  # else they lie elsewhere, and there is no time to look
        newest = max(steps, default=None)
        write_stopped(run, f"{reason} before training went on", newest or 0, None, newest, rank)
    if rank == 0:
        print(f"error: stopped by {reason} before training began", file=sys.stderr, flush=True)
    _leave(ResumableError.exit_code)


def _leave(code: int) -> None:
    """End at once: all is written, and libraries that tidy up may wait for ranks that are gone."""
    sys.stdout.flush()
    os._exit(code)


def quiet() -> None:
    """Libraries' chatter off: it comes once a rank and tells the user nothing to act on. Before torch is imported."""
    # With every peer that is gone torch's sockets print a C++ stack; the watchdog says it in a line.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    warnings.filterwarnings("ignore", module=r"(torch|torchrec|deepspeed|fbgemm_gpu)(\.|$)")
    for name in ("torch", "torchrec", "torch.fx._symbolic_trace"):
        logging.getLogger(name).setLevel(logging.ERROR)


if __name__ == "__main__":
    main()
