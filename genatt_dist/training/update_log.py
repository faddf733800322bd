"""The log of updates: lines of kind `train`, each with the mean losses of some updates and how fast they were.

Every rank writes them at the same steps, because losses are summed over ranks. What a stopped run had not told goes
into its checkpoint, and is told by the run that goes on, as if there had been no stop.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import torch

from data_pipeline.errors import GenattError
from genatt_dist.data.batches import Batch
from genatt_dist.training.checkpoint.progress import Progress
from genatt_dist.training.nonfinite import NotFiniteError, Trail
from genatt_dist.training.performance import Performance
from genatt_dist.training.step import Losses
from genatt_dist.training.telemetry import Telemetry

_LOG_STEPS = 10


class UpdateLog:
    """The updates that no line has told yet, and since when they are made."""

    def __init__(
        self, run: Path, telemetry: Telemetry, performance: Performance, learning_rate: float, progress: Progress
    ) -> None:
        """learning_rate: its peak. progress: where the run begins; what was pending there is taken over."""
        self._telemetry, self._performance, self._learning_rate = telemetry, performance, learning_rate
        self._trail, progress.pending = Trail(run, progress.pending), []
        self.start()

    def start(self) -> None:
        """The first update begins that no line has told: from here on time counts."""
        self._since = time.perf_counter()

    def add(self, losses: Losses, batches: Sequence[Batch], progress: Progress) -> None:
        """An update was done. progress: its step, and the epoch and number of its first batch."""
        self._trail.add(losses, batches, progress.step, progress.epoch, progress.batch)

    @property
    def is_empty(self) -> bool:
        """Whether all updates are told."""
        return not len(self._trail)

    @property
    def is_full(self) -> bool:
        """Whether there are enough for a line."""
        return len(self._trail) == _LOG_STEPS

    def tell(self, progress: Progress, rate: float) -> None:
        """Write a line of the updates since the last one, and count their time in `progress`. Collective.

        rate: the last one's share of the peak learning rate. Raises GenattError when a loss is not finite.
        """
        speed: dict[str, float] = {}
        if self._trail.num_updates:
            seconds, speed = self._performance.interval(self._since)
            progress.step_seconds += seconds
        recommendation, generative = torch.tensor(self._trail.losses()).mean(0).tolist()
        self._trail.clear()
        values = {
            "epoch": progress.epoch,
            "loss": recommendation,
            "generative_loss": generative,
            "learning_rate": self._learning_rate * rate,
            **speed,
        }
        self._telemetry.record("train", progress.step, values)
        self._telemetry.advance(
            progress.step,
            f"epoch {progress.epoch + 1} loss {recommendation:.4f} {speed.get('sequences_per_second', 0.0):,.0f} "
            "sequences/s",
        )
        self.start()

    def hand_over(self, progress: Progress) -> None:
        """Leave what is not told to the run that goes on from `progress`. Collective; raises as `tell` does."""
        progress.pending = self._trail.losses()
        if self._trail.num_updates:
            progress.step_seconds += time.perf_counter() - self._since

    def explain(self, error: NotFiniteError) -> GenattError:
        """The error of weights that the last update left. Collective."""
        return self._trail.explain(error)
