"""The `loss:` section of a configuration."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from genatt_dist.section import Section

# Which kinds read what: set with another kind it would be left out without a word. (`num_negatives` is no sign of a
# mistake: configurations set it once and try several kinds.)
_READ_BY = {
    "proposal": ("sampled",),
    "shared": ("sampled", "gbce"),
    "logq": ("sampled",),
    "calibration": ("gbce",),
    "chunk_tokens": ("full",),
}


class LossConfig(Section):
    """What is minimised for each real target."""

    kind: Literal["full", "sampled", "bce", "gbce"] = "full"
    num_negatives: int = Field(256, ge=1, description="K: negatives of a target (sampled, gbce).")
    proposal: Literal["uniform", "log_uniform", "popularity", "in_batch"] = Field(
        "uniform", description="Law of the negatives (sampled); in_batch: the targets of the global batch, all of them."
    )
    shared: bool | None = Field(
        None,
        description="One set of negatives for the global batch, or own ones for each target (sampled, gbce); "
        "default: shared for sampled, own for gbce.",
    )
    logq: bool = Field(True, description="Correct the scores of negatives by their expected counts (sampled).")
    calibration: float = Field(
        0.75, ge=0, le=1, description="t of gbce: 0 is binary cross-entropy, 1 has calibrated probabilities."
    )
    temperature: float = Field(1.0, gt=0, description="τ: losses are taken of scores/τ. Ranking does not depend on it.")
    chunk_tokens: int | None = Field(
        None,
        ge=1,
        description="Targets whose logits exist at one time (full); default: by the catalogue's size and device.",
    )

    @property
    def shares_negatives(self) -> bool:
        """Whether the targets of a global batch have the same negatives (bce: never)."""
        if self.kind == "bce":
            return False
        return self.kind == "sampled" if self.shared is None else self.shared

    @model_validator(mode="after")
    def _possible(self) -> LossConfig:
        if self.proposal == "in_batch" and self.kind == "sampled" and self.shared is False:
            raise ValueError(
                "proposal=in_batch with shared=false: the targets of the batch are the same negatives for all; use "
                "shared=true, or proposal=popularity"
            )
        if self.kind == "gbce" and self.proposal != "uniform":
            raise ValueError(
                f"kind=gbce with proposal={self.proposal}: its calibration assumes uniform negatives; use "
                "proposal=uniform, or kind=sampled"
            )
        for name, kinds in _READ_BY.items():
            value = getattr(self, name)
            if self.kind not in kinds and value != type(self).model_fields[name].default:
                raise ValueError(
                    f"{name}={value} with kind={self.kind}: only kind={' and '.join(kinds)} reads it; drop "
                    f"loss.{name}, or set loss.kind={kinds[0]}"
                )
        return self
