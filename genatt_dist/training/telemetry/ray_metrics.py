"""A run's numbers as metrics of Ray, which every node exports for Prometheus: genatt_train_loss and the like, with tags
for the run and the rank.
"""

from __future__ import annotations

import math
import os
import re
import sys
from pathlib import Path
from typing import Any

from genatt_dist.training.telemetry.writers import Values, scalars
from genatt_dist.training.warnings import FailureSign


def in_ray() -> bool:
    """Whether this process is part of a Ray cluster: a worker of Ray Train, say."""
    ray = sys.modules.get("ray")
    return ray is not None and bool(ray.is_initialized())


class RayMetrics:
    """A gauge for each number of a record, and counters of updates and of warnings."""

    def __init__(self, run: Path, first_step: int) -> None:
        from ray.util import metrics

        self._metrics, self._last = metrics, first_step
        self._tags = {"run": run.name, "rank": os.environ.get("RANK", "0")}
        self._gauges: dict[str, Any] = {}
        self._steps = metrics.Counter("genatt_steps", "Updates of this process.", tuple(self._tags))
        self._warnings = metrics.Counter("genatt_warnings", "Signs of failure.", (*self._tags, "sign"))

    def record(self, kind: str, step: int, values: Values) -> None:
        if step > self._last:
            self._steps.inc(step - self._last, tags=self._tags)
            self._last = step
        for name, value in scalars(kind, values).items():
            if math.isfinite(value):
                self._gauge(name).set(value, tags=self._tags)

    def warn(self, step: int, sign: FailureSign) -> None:
        self._warnings.inc(1, tags=self._tags | {"sign": sign.name})

    def close(self, failed: bool) -> None:
        """Ray takes the metrics of a process away with it."""

    def _gauge(self, name: str) -> Any:
        if name not in self._gauges:
            exported = "genatt_" + re.sub(r"\W", "_", name.replace("@", "_at_"))
            self._gauges[name] = self._metrics.Gauge(exported, f"{name} of a run.", tuple(self._tags))
        return self._gauges[name]
