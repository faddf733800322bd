"""The `training:` section of a configuration."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from genatt_dist.section import Section


class CheckpointConfig(Section):
    """Where checkpoints go, how they are written and how many stay."""

    path: str | None = Field(
        None,
        description="Directory of this run's checkpoints alone, any fsspec URL; default: checkpoints/ in the run "
        "directory.",
    )
    background: bool = Field(
        True,
        description="Training goes on while a copy of this rank's tables, their optimizer state and (rank 0) the dense "
        "state is written: it takes that much memory more.",
    )
    keep_last: int = Field(1, ge=1, description="Newest checkpoints kept.")
    keep_best: int = Field(1, ge=1, description="Checkpoints with the best validation NDCG@10 kept beside them.")


class TrainingConfig(Section):
    """How long, how fast and with which optimizer."""

    epochs: int = Field(20, ge=1)
    max_seconds: float | None = Field(
        None, gt=0, description="Stop training at the first epoch end after this many seconds."
    )
    batch_sequences: int = Field(
        256, ge=1, description="Sequences of a global batch on average; batches hold equal numbers of tokens."
    )
    accumulation_steps: int = Field(1, ge=1, description="Global batches summed before one update.")
    optimizer: Literal["adamw", "sgd"] = "adamw"
    learning_rate: float = Field(1e-3, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    beta2: float = Field(0.98, gt=0, lt=1)
    warmup: float = Field(0.02, ge=0, lt=1, description="Share of all steps over which the rates rise.")
    decay: Literal["constant", "linear", "cosine"] = "cosine"
    final_rate: float = Field(0.1, ge=0, le=1, description="Rates at the last step as a share of their peak.")
    gradient_clipping: float = Field(
        0.0, ge=0, description="Norm limit of the dense gradients; 0 = off. Never reaches a sharded table."
    )
    precision: Literal["fp32", "bf16"] = "fp32"
    zero_stage: Literal[0, 1, 2, 3] = 1
    patience: int = Field(5, ge=1, description="Evaluations without a better validation NDCG@10 before training stops.")
    evaluate_every: int = Field(1, ge=1, description="Epochs between evaluations.")
    checkpoint_every: int | None = Field(
        None,
        ge=1,
        description="Updates between checkpoints; one is written after each evaluation anyway.",
    )
    checkpoint: CheckpointConfig = CheckpointConfig()
    stop_seconds: float = Field(
        25.0,
        gt=0,
        description="After SIGTERM, Ctrl-C or a notice of preemption: the step under way ends and a checkpoint is "
        "written within this time, or the run ends without one.",
    )
    silence_seconds: float = Field(
        30.0, ge=5, description="A rank that gives no sign of life for this long is lost, and named."
    )
    collective_seconds: float = Field(
        600.0,
        ge=10,
        description="A step, or one operation over all ranks, that takes longer hangs, and is named. Set-up and a "
        "batch of validation have three times that, a checkpoint half an hour more.",
    )
    seed: int = Field(0, ge=0)
