"""The `loss:` section of a configuration."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from genatt_dist.section import Section


class LossConfig(Section):
    """What is minimised for each real target."""

    kind: Literal["full", "sampled", "bce"] = "full"
    num_negatives: int = Field(256, ge=1, description="Negatives shared by the global batch (sampled).")
    proposal: Literal["uniform", "log_uniform", "popularity"] = Field(
        "uniform", description="Law of the negatives (sampled)."
    )
    chunk_tokens: int | None = Field(
        None,
        ge=1,
        description="Targets whose logits exist at one time (full); default: by the catalogue's size and device.",
    )
