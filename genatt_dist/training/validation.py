"""A validation: the targets of all users ranked, the maps looked at, the best step chosen, and all of it told."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from genatt_dist.config import RunConfig
from genatt_dist.data.sequences import Sequences
from genatt_dist.evaluation.diagnose import diagnose
from genatt_dist.evaluation.evaluate import Parts, evaluate
from genatt_dist.training.checkpoint.progress import Progress
from genatt_dist.training.engine import sum_over_ranks
from genatt_dist.training.learner import Learner
from genatt_dist.training.mark import Mark
from genatt_dist.training.signs import VALIDATION
from genatt_dist.training.stopping import Agreement
from genatt_dist.training.telemetry import Telemetry
from genatt_dist.training.warnings import FailureSigns

SELECTION = "ndcg@10"


class AbandonedError(Exception):
    """All ranks agreed to stop in the middle of a validation."""


@dataclass(frozen=True)
class Found:
    """What a validation found. improved: whether its step is the best so far. vectors: of the maps, by name."""

    metrics: dict[str, float]
    vectors: dict[str, list[float]]
    improved: bool


class Validation:
    """The validations of one run. Collective: all ranks do each."""

    def __init__(
        self,
        config: RunConfig,
        sequences: Sequences,
        learner: Learner,
        device: torch.device,
        mark: Mark,
        agreement: Agreement,
        telemetry: Telemetry,
        total_steps: int,
    ) -> None:
        """agreement: to stop, asked for after each batch of users. total_steps: updates of the whole run."""
        self._config, self._sequences, self._learner, self._device = config, sequences, learner, device
        self._mark, self._agreement, self._telemetry = mark, agreement, telemetry
        self._signs = FailureSigns(config, total_steps, telemetry.records())

    def rank(self, progress: Progress) -> Found:
        """Rank the validation targets and look at the maps; `progress` then knows the best step, and for how many
        validations there was no better one. Raises AbandonedError when the ranks agree to stop in it.
        """
        self._mark.at(VALIDATION)
        parts = Parts(dist.get_rank(), dist.get_world_size(), sum_over_ranks)
        with self._learner.evaluating() as (backbone, table):
            of = (backbone, table, self._sequences, "valid", self._config, self._device, parts)
            result = evaluate(*of, self._ranked)
            diagnosis = diagnose(*of)
        metric, metrics = result.metrics[SELECTION], result.metrics | diagnosis.values
        improved = metric > progress.best_metric
        progress.metric = metric
        if improved:
            progress.best_metric, progress.best_step, progress.best_metrics = metric, progress.step, metrics
        progress.stale = 0 if improved else progress.stale + 1
        return Found(metrics, diagnosis.vectors, improved)

    def tell(self, found: Found, progress: Progress, last: bool) -> None:
        """Log it, and warn of failure signs. last: whether training ends with it."""
        record: dict[str, float | list[float]] = {"epoch": progress.epoch, **found.metrics, **found.vectors}
        self._telemetry.record("valid", progress.step, record)
        self._telemetry.say(
            f"{self._config.model.attention.type}: epoch {progress.epoch}/{self._config.training.epochs}  "
            f"valid {SELECTION} {found.metrics[SELECTION]:.4f}  recall@10 "
            f"{found.metrics['recall@10']:.4f}{'  best so far' if found.improved else ''}  "
            f"[{progress.seconds:.0f} s, {progress.sequences / max(progress.step_seconds, 1e-9):,.0f} sequences/s]"
        )
        for sign in self._signs.look({"step": progress.step, **record}, last):
            self._telemetry.warn(progress.step, sign)

    def _ranked(self, users: int) -> None:
        """After each batch of users; all ranks have the same number of them."""
        self._mark.at(VALIDATION)
        if self._agreement.reached():
            raise AbandonedError
