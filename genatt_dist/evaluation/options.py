"""The `evaluation:` section of a configuration."""

from __future__ import annotations

from pydantic import Field

from genatt_dist.section import Section


class EvaluationConfig(Section):
    """Full ranking over the catalogue (EVALUATION protocol)."""

    exclude_seen: bool = True
    batch_users: int = Field(512, ge=1)
    chunk_items: int = Field(65_536, ge=1, description="Items scored at one time.")
    category_column: str | None = Field(
        None,
        description="Attribute column of the vocabulary that holds items' categories; default: the only one of lists "
        "of text, else the only one of text that repeats.",
    )
