"""What a finished run reports: RUN/summary.json."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from genatt_dist.config import RunConfig
from genatt_dist.training.checkpoint.progress import Progress


@dataclass(frozen=True)
class Summary:
    """The best validation metrics, how the training went, and how fast its steps were."""

    valid: dict[str, float]
    train: dict[str, float | int | str]
    performance: dict[str, Any]

    @staticmethod
    def of(
        config: RunConfig, progress: Progress, launcher: str, world_size: int, performance: dict[str, Any]
    ) -> Summary:
        """progress: at the run's end. performance: see `Performance.summary`."""
        return Summary(
            valid=progress.best_metrics,
            train={
                "seconds": round(progress.seconds, 1),
                "epochs": progress.epoch,
                "sequences_per_second": round(progress.sequences / max(progress.step_seconds, 1e-9), 1),
                "world_size": world_size,
                "launcher": launcher,
                "table": config.table.kind,
                "zero_stage": config.training.zero_stage,
            },
            performance=performance,
        )

    def write(self, run: Path) -> None:
        """Into the run directory, atomically."""
        temporary = run / f".summary.{os.getpid()}"
        temporary.write_text(json.dumps(asdict(self), indent=2))
        temporary.rename(run / "summary.json")
