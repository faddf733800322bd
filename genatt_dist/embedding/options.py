"""The `table:` section of a configuration."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from data_pipeline.errors import GenattError
from genatt_dist.section import Section

Sharding = Literal["auto", "row_wise", "table_wise", "column_wise"]
TableOptimizer = Literal["rowwise_adagrad", "adagrad", "sgd", "adam", "partial_rowwise_adam"]
CPU_OPTIMIZERS = ("rowwise_adagrad", "adagrad", "sgd")
# One number of state a row instead of one a weight.
ROWWISE_OPTIMIZERS = ("rowwise_adagrad", "partial_rowwise_adam")
CPU_SHARDINGS = ("auto", "row_wise", "table_wise")
DEFAULT_EPS = 1e-8

# What TorchRec calls sharding too, and why a table of sequences' items cannot have it.
_OTHER_SHARDINGS = dict.fromkeys(
    ("table_row_wise", "table_column_wise", "grid_shard"),
    "TorchRec has it for pooled bags of ids only (EmbeddingBagCollection), a sequence needs the row of each id; use "
    "row_wise or table_wise",
) | {
    "data_parallel": "a table that every rank holds whole belongs to the dense model here; use table.kind=replicated",
    "column_wise": "the scores of an item need its whole row in one place; use row_wise or table_wise",
}


class ManagedCollision(Section):
    """A table with fewer rows than the catalogue has items: rows belong to the items that training sees (TorchRec's
    managed collision).
    """

    rows: int = Field(ge=2, description="Of the item table; one of them is shared by all items without their own.")
    policy: Literal["lfu", "lru", "distance_lfu"] = Field(
        "distance_lfu", description="Who keeps a row: the most frequent items, the latest ones, or by both."
    )
    eviction_interval: int = Field(100, ge=1, description="Steps after which rows change hands again; first at once.")


class TableConfig(Section):
    """The item table: inside the dense model, or sharded over the ranks by TorchRec."""

    kind: Literal["replicated", "sharded"] = "replicated"
    sharding: Sharding = Field(
        "auto", description="How a sharded table is cut: by rows over all ranks (auto), or whole on one of them."
    )
    optimizer: TableOptimizer = Field(
        "rowwise_adagrad",
        description="Fused optimizer of a sharded table; a replicated one shares the dense optimizer. "
        "adam and partial_rowwise_adam need CUDA.",
    )
    learning_rate: float | None = Field(None, gt=0, description="Sharded table only; default: training.learning_rate.")
    eps: float = Field(DEFAULT_EPS, gt=0, description="Added to the root of the optimizer's state.")
    weight_decay: float = Field(0.0, ge=0, description="Of the rows that a step touches; rowwise_adagrad only.")
    weight_decay_mode: Literal["l2", "decoupled"] = Field(
        "l2", description="Decay added to the gradient, or taken off the weight."
    )
    max_norm: float | None = Field(
        None, gt=0, description="Norm that an updated row is cut to; rowwise_adagrad on CUDA."
    )
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        "fp32", description="Of a sharded table's rows (bf16: CUDA); its optimizer's state is fp32. Rounds to nearest."
    )
    init_std: float = Field(0.02, gt=0)
    managed_collision: ManagedCollision | None = Field(
        None, description="More items than rows (CUDA; not with loss.kind=full). Default: a row for every item."
    )

    @field_validator("sharding", mode="before")
    @classmethod
    def _known_sharding(cls, value: object) -> object:
        if isinstance(value, str) and value in _OTHER_SHARDINGS:
            raise ValueError(f"sharding={value}: {_OTHER_SHARDINGS[value]}")
        return value

    @model_validator(mode="after")
    def _possible(self) -> TableConfig:
        if self.kind == "replicated":
            fields = ("sharding", "eps", "weight_decay", "max_norm", "precision", "managed_collision")
            changed = [name for name in fields if getattr(self, name) != type(self).model_fields[name].default]
            if changed:
                raise ValueError(
                    f"{changed[0]} with kind=replicated: a replicated table is a parameter of the dense model, which "
                    f"training.* governs; drop table.{changed[0]}, or set table.kind=sharded"
                )
        for name in ("weight_decay", "max_norm"):
            if getattr(self, name) and self.optimizer != "rowwise_adagrad":
                raise ValueError(
                    f"{name} with optimizer={self.optimizer}: its fused kernel leaves {name} out without a "
                    "word, or was never checked with it; use optimizer=rowwise_adagrad"
                )
        if self.weight_decay_mode != "l2" and not self.weight_decay:
            raise ValueError(f"weight_decay_mode={self.weight_decay_mode} with weight_decay=0: set weight_decay too")
        return self


def check_device(config: TableConfig, device_type: str) -> None:
    """Raise GenattError where the kernels of the device (`cpu`, `cuda`) cannot do what the section asks.

    The device is not known when a configuration is read, so this is called before ranks start and when a table is made.
    """
    if config.kind == "replicated":
        return
    if device_type == "cuda":
        return
    if config.optimizer not in CPU_OPTIMIZERS:
        raise GenattError(
            f"table.optimizer={config.optimizer} on {device_type}: fbgemm has this fused optimizer on CUDA only; use "
            f"{', '.join(CPU_OPTIMIZERS)}, or table.kind=replicated with training.optimizer=adamw"
        )
    if config.precision == "bf16":
        raise GenattError(
            f"table.precision=bf16 on {device_type}: fbgemm looks up no bfloat16 rows there; use fp16 or fp32"
        )
    if config.max_norm is not None:
        raise GenattError(
            f"table.max_norm={config.max_norm} on {device_type}: fbgemm's kernel leaves it out there; use "
            "table.weight_decay, or train on CUDA"
        )
    if config.managed_collision:
        raise GenattError(
            f"table.managed_collision on {device_type}: TorchRec's managed collision of sharded tables is for CUDA "
            "only; prepare the data with --hash-buckets instead"
        )
