"""A run's duty to save: its checkpoints in their order, and the one that a run leaves which was asked to stop."""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

import torch.distributed as dist

from genatt_dist import run_storage
from genatt_dist.training.checkpoint.progress import Progress
from genatt_dist.training.mark import Mark
from genatt_dist.training.nonfinite import NotFiniteError
from genatt_dist.training.saving import Saver
from genatt_dist.training.signs import CHECKPOINT
from genatt_dist.training.stopped import StoppedError, advice, write_stopped
from genatt_dist.training.update_log import UpdateLog


class Checkpointing:
    """The checkpoints of one run. saver: what writes them; a context around training."""

    def __init__(
        self, run: Path, saver: Saver, mark: Mark, group: dist.ProcessGroup | None, resumed_step: int | None
    ) -> None:
        """group: of all ranks, None for one. resumed_step: of the checkpoint that the run goes on from."""
        self.saver = saver
        self._run, self._mark, self._group, self._newest = run, mark, group, resumed_step

    def save(self, progress: Progress, log: UpdateLog) -> None:
        """Write a checkpoint, or begin to. Collective. Raises GenattError, also where weights are not finite."""
        self._mark.at(CHECKPOINT)
        if self._newest == progress.step:  # before a validation that was stopped, and done when resumed
            self.saver.amend(progress)
            return
        if dist.get_rank() == 0:
            run_storage.send(self._run)
        try:
            self.saver.save(progress)
        except NotFiniteError as error:
            raise log.explain(error) from None
        self._newest = progress.step

    def wait(self) -> None:
        """Return when the last one is complete, on all ranks. Collective."""
        self._mark.at(CHECKPOINT)  # it may be under way, and longer than another operation may last
        self.saver.wait()
        if self._group is not None:
            dist.barrier(self._group)

    def stop(self, progress: Progress, log: UpdateLog, reason: str, save: bool) -> NoReturn:
        """Write a checkpoint where the cursor is, say so in the run directory, and raise StoppedError. Collective.

        save: False where a run cannot go on from this cursor.
        """
        if save and self._newest != progress.step:
            log.hand_over(progress)
            self.save(progress, log)
        self.saver.wait()
        if dist.get_rank() == 0:
            write_stopped(self._run, reason, progress.step, progress.epoch, self._newest)
        if self._group is not None:
            dist.barrier(self._group)  # behind it the checkpoint is complete, and told, for all ranks
        raise StoppedError(
            f"stopped by {reason} after step {progress.step} (epoch {progress.epoch + 1}); {advice(self._newest)}"
        )
