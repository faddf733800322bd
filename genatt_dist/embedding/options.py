"""The `table:` section of a configuration."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from genatt_dist.section import Section


class TableConfig(Section):
    """The item table: inside the dense model, or row-wise sharded over the ranks by TorchRec."""

    kind: Literal["replicated", "sharded"] = "replicated"
    optimizer: Literal["rowwise_adagrad", "adagrad", "sgd"] = Field(
        "rowwise_adagrad",
        description="Fused optimizer of a sharded table; a replicated one shares the dense optimizer.",
    )
    learning_rate: float | None = Field(None, gt=0, description="Sharded table only; default: training.learning_rate.")
    init_std: float = Field(0.02, gt=0)
