"""Where a run stands, as numbers that fit in a small JSON file."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Progress:
    """`epoch` and `batch` are the cursor of the next global batch, `step` counts updates.

    The seed is in the configuration, and all draws (noise, dropout, negatives, the order of windows) are functions of
    the seed and these numbers, as are the learning rates of the numbers and the configuration: there is no generator
    whose state would have to be kept.

    vocabulary_hash: sha256 of the vocabulary. metric: what the validation right before this checkpoint gave, None where
    there was none. begun_epoch, begun_step: cursor at the first epoch of this version of the data (not 0 when the data
    grew on the way). seconds: since the start, validation and checkpoints included; step_seconds: in training steps
    alone. stale: evaluations since the best one. pending: both losses of the updates that the log has not told yet,
    where a run was stopped between two of its records.

    `batch` is the number of all batches where an epoch is trained but its end (validation, checkpoint) is not done.
    """

    manifest_hash: str
    step: int = 0
    epoch: int = 0
    batch: int = 0
    vocabulary_hash: str = ""
    begun_epoch: int = 0
    begun_step: int = 0
    seconds: float = 0.0
    step_seconds: float = 0.0
    sequences: int = 0
    stale: int = 0
    metric: float | None = None
    best_metric: float = -1.0
    best_step: int = -1
    best_metrics: dict[str, float] = field(default_factory=dict)
    pending: list[list[float]] = field(default_factory=list)
