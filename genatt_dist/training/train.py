"""One training run on one rank, from its run directory to its best checkpoint. Every launcher calls `train`.

Around the loop (trainer.py) it makes the process group and a second one for what is not training, and has the ranks
watched (watchdog.py) while requests to stop (preemption.py) are served.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

from genatt_dist.config import RunConfig
from genatt_dist.data.batches import TrainingBatches
from genatt_dist.training import preemption
from genatt_dist.training.checkpoint.store import Store
from genatt_dist.training.engine import init_process_group, select_device
from genatt_dist.training.mark import Mark
from genatt_dist.training.saving import WRITE_SECONDS
from genatt_dist.training.signs import Limits
from genatt_dist.training.stopped import STOPPED, StoppedError
from genatt_dist.training.stopping import control_group
from genatt_dist.training.summary import Summary
from genatt_dist.training.trainer import Feed, Trainer
from genatt_dist.training.watchdog import Watchdog, watched


def train(
    config: RunConfig,
    run: Path,
    launcher: str,
    resume: bool = False,
    feed: Callable[[TrainingBatches], Feed] | None = None,
) -> Summary:
    """Train `config` into the directory `run`; the process group's variables are in the environment.

    feed: makes of the plan what feeds the ranks; default: the plan itself, which reads the shards.
    Raises GenattError with one line for the user, a ResumableError where the run can go on, on all ranks. Writes
    `summary.json` when done, `stopped.json` when stopped. A rank that is lost or hangs ends the process (watchdog.py).
    """
    training, device = config.training, select_device()
    limits = Limits.of(training.silence_seconds, training.collective_seconds, WRITE_SECONDS)
    init_process_group(device, limits.longest + 2 * limits.silence)
    together = device.type == "cpu"
    try:
        rank, world_size, mark = dist.get_rank(), dist.get_world_size(), Mark()
        if rank == 0:
            (run / STOPPED).unlink(missing_ok=True)
        if config.table.kind == "sharded":  # loading its kernels holds Python's lock: no sign of life meanwhile
            import genatt_dist.embedding.sharded  # noqa: F401
        group, store = control_group(limits.longest + 2 * limits.silence), Store.of(run, training.checkpoint)
        watchdog = Watchdog(mark, run, store, limits, training.stop_seconds, rank, world_size)
        with preemption.serving(), watched(watchdog, group):
            summary = Trainer(run, config, device, launcher, resume, feed, mark, group).run()
        together = True
        return summary
    except StoppedError:
        together = True
        raise
    finally:
        if together:  # NCCL would wait, unwatched, for collectives that ranks elsewhere never join
            dist.destroy_process_group()
