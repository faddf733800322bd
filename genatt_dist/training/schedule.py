"""How rates and weights move over the steps of a run: factors of the step number alone, so that a resumed run goes on
unchanged.
"""

from __future__ import annotations

import math

from genatt_dist.config import TrainingConfig


def rate_factor(config: TrainingConfig, step: int, total_steps: int) -> float:
    """Learning rate of update `step` (from 0) as a share of its peak: linear warm-up, then constant, linear or cosine
    decay.
    """
    warmup_steps = round(config.warmup * total_steps)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    done = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    remaining = {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1.0 + math.cos(math.pi * done))}[config.decay]
    return 1.0 if config.decay == "constant" else config.final_rate + (1.0 - config.final_rate) * remaining


def gamma_factor(warmup: float, step: int, total_steps: int) -> float:
    """Weight of the generative loss at update `step` as a share of γ: linear from 0 to 1 over the first `warmup` of
    the run.
    """
    return min(1.0, step / (warmup * total_steps)) if warmup else 1.0
