"""Which interactions train, and which are held out: a rule kept in the manifest, not a copy of the data."""

from typing import Literal

import polars as pl
from pydantic import BaseModel, ConfigDict, Field

HELD_OUT = 2  # the last interaction (test) and the one before it (valid)


class LeaveOneOut(BaseModel):
    """Users with at least `min_length` interactions: last = test, second last = valid. Shorter users only train."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rule: Literal["leave_one_out"] = "leave_one_out"
    min_length: int = Field(3, ge=HELD_OUT + 1)

    def train_length(self, length: int) -> int:
        """How many of a user's first interactions train, for a sequence of `length`."""
        return length - HELD_OUT if length >= self.min_length else length

    def train_lengths(self, lengths: pl.Expr) -> pl.Expr:
        """`train_length` for a column of lengths."""
        lengths = lengths.cast(pl.Int64)
        return pl.when(lengths >= self.min_length).then(lengths - HELD_OUT).otherwise(lengths)
