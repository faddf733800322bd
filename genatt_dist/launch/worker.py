"""What every launcher starts on every rank: `python -m genatt_dist.launch.worker DIR --launcher NAME [--resume]`.

A user's mistake ends the process with one line (told by rank 0 where all ranks meet it) and exit code 2; anything else
is a bug and keeps its traceback.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
import warnings
from pathlib import Path

from data_pipeline.errors import GenattError
from genatt_dist.launch.orphan import end_with_launcher

USER_ERROR = 2
_RANK_0_FIRST_SECONDS = 3
# What gloo and NCCL say of a peer that is gone.
_LOST_PEER = ("Connection closed by peer", "Connection reset by peer", "remote process exited")


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
    end_with_launcher()
    _quiet()
    from genatt_dist import config as configuration
    from genatt_dist.training.trainer import train

    try:
        train(configuration.load(arguments.run / "config.yaml"), arguments.run, arguments.launcher, arguments.resume)
    except GenattError as error:
        rank = os.environ.get("RANK", "0")
        if rank != "0":
            # Mostly rank 0 says the same and the launcher ends this process meanwhile;
            # an error of this rank alone is told.
            time.sleep(_RANK_0_FIRST_SECONDS)
        print(f"error: {error}" if rank == "0" else f"error (rank {rank}): {error}", file=sys.stderr, flush=True)
        sys.exit(USER_ERROR)
    except RuntimeError as error:
        if not any(sign in str(error) for sign in _LOST_PEER):
            raise
        print(f"rank {os.environ.get('RANK', '0')}: another rank ended; it says why", file=sys.stderr, flush=True)
        sys.exit(1)


def _quiet() -> None:
    """Libraries' chatter off: it comes once a rank and tells the user nothing to act on."""
    warnings.filterwarnings("ignore", module=r"(torch|torchrec|deepspeed|fbgemm_gpu)(\.|$)")
    for name in ("torch", "torchrec", "torch.fx._symbolic_trace"):
        logging.getLogger(name).setLevel(logging.ERROR)


if __name__ == "__main__":
    main()
