"""The `features:` list of a configuration: what the model's input knows of an item and of an event besides the id."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from genatt_dist.section import Section

_NAME = r"^[a-z][a-z0-9_]*$"
RESERVED = ("item", "items")  # the item table itself, in checkpoints and lookups


class _NamedFeature(Section):
    """A feature has a table of its own; `name` names it in checkpoints. Default: the column."""

    name: str = Field("", pattern=_NAME, description="Small letters, digits and _; default: the column's name.")

    @model_validator(mode="before")
    @classmethod
    def _named_by_column(cls, tree: Any) -> Any:
        if isinstance(tree, dict) and "name" not in tree and isinstance(tree.get("column"), str):
            return tree | {"name": tree["column"]}
        return tree

    @model_validator(mode="after")
    def _free(self) -> _NamedFeature:
        if self.name in RESERVED:
            raise ValueError(f"name={self.name} is the item table's own: give the feature another name")
        return self


class AttributeFeature(_NamedFeature):
    """Values of an item's attribute (`genatt prepare --items`): the mean of their rows is added to the item's row."""

    type: Literal["attribute"] = "attribute"
    column: str = Field(description="Column of the vocabulary: text or whole numbers, one value an item or a list.")
    table: Literal["replicated", "sharded"] = Field(
        "replicated", description="sharded: a further table beside a sharded item table, for millions of values."
    )
    buckets: int | None = Field(
        None, ge=1, lt=1 << 31, description="Rows of the table, a value's is its hash; default: each value has its own."
    )
    max_values: int | None = Field(None, ge=1, description="Only the first so many values of an item; default: all.")

    @property
    def sharded(self) -> bool:
        return self.table == "sharded"


class ContextFeature(_NamedFeature):
    """What is known of an event from its time, and of no later one: its row is added to the item's row."""

    type: Literal["context"] = "context"
    column: Literal["hour_of_week", "gap"] = Field(
        description="hour_of_week: 0-167 in UTC from Monday on; gap: log2 of the seconds since the event before."
    )

    @property
    def sharded(self) -> bool:
        """Few rows: every rank holds them."""
        return False


Feature = Annotated[AttributeFeature | ContextFeature, Field(discriminator="type")]
