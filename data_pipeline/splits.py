"""Which interactions train, and which are held out: a rule kept in the manifest, and its outcome for each user.

The outcome is three numbers a user: the first `train` interactions train; `valid` and `test` are the places of the two
targets in the sequence, -1 where the user has none. Everything before a target is its history.
"""

import datetime
from collections.abc import Callable
from contextlib import suppress
from typing import Annotated, Literal

import numpy as np
import polars as pl
from pydantic import BaseModel, ConfigDict, Field, model_validator

from data_pipeline.errors import GenattError
from data_pipeline.hashing import hash64

HELD_OUT = 2  # the last interaction (test) and the one before it (valid)
NONE = -1
_USERS_KEY = 0x5EED  # another key than the shards' and their order's


class _Rule(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class LeaveOneOut(_Rule):
    """Users with at least `min_length` interactions: last = test, second last = valid. Shorter users only train."""

    rule: Literal["leave_one_out"] = "leave_one_out"
    min_length: int = Field(3, ge=HELD_OUT + 1)

    def places(self, sequences: pl.DataFrame) -> pl.DataFrame:
        """train, valid, test of each user, from the lengths alone."""
        length = pl.col("item_ids").list.len().cast(pl.Int32)
        long = length >= self.min_length
        return sequences.select(
            train=pl.when(long).then(length - HELD_OUT).otherwise(length),
            valid=pl.when(long).then(length - 2).otherwise(NONE),
            test=pl.when(long).then(length - 1).otherwise(NONE),
        )


class TimePoint(_Rule):
    """Train before `valid_from`; targets: a user's first interaction from then to `test_from`, and from that on.

    Both are numbers in the unit of the time column, or ISO dates until `resolved`. A target needs a history: users who
    begin later have none.
    """

    rule: Literal["time"] = "time"
    valid_from: int | str
    test_from: int | str

    @model_validator(mode="after")
    def _in_order(self) -> "TimePoint":
        valid_from, test_from = _comparable(self.valid_from), _comparable(self.test_from)
        known = valid_from is not None and type(valid_from) is type(test_from)
        if known and valid_from >= test_from:  # type: ignore[operator]
            raise ValueError(f"valid_from={self.valid_from} must lie before test_from={self.test_from}")
        return self

    def resolved(self, moment: Callable[[int | str], int]) -> "TimePoint":
        """With both times in the unit of the time column, as `moment` says; `GenattError` if they are out of order."""
        valid_from, test_from = moment(self.valid_from), moment(self.test_from)
        if valid_from >= test_from:
            raise GenattError(
                f"split time:{self.valid_from},{self.test_from}: in the unit of the times these are {valid_from} and "
                f"{test_from}: the second must be later"
            )
        return TimePoint(valid_from=valid_from, test_from=test_from)

    def places(self, sequences: pl.DataFrame) -> pl.DataFrame:
        """train, valid, test of each user, from its times (in order)."""
        before = [
            (pl.col("timestamps").list.eval(pl.element() < bound)).list.sum().cast(pl.Int32).alias(name)
            for name, bound in (("train", self.valid_from), ("known", self.test_from))
        ]
        length = pl.col("item_ids").list.len().cast(pl.Int32)
        train, known = pl.col("train"), pl.col("known")
        return sequences.select(*before, length=length).select(
            train=train,
            valid=pl.when((train >= 1) & (train < known)).then(train).otherwise(NONE),
            test=pl.when((known >= 1) & (known < pl.col("length"))).then(known).otherwise(NONE),
        )


class RandomUsers(_Rule):
    """A share of the users, drawn by a hash of their id, is for validation, another for testing; the rest trains.

    The target of a held-out user is its last interaction; users with a single one have none.
    """

    rule: Literal["users"] = "users"
    valid_share: float = Field(gt=0, lt=1)
    test_share: float = Field(gt=0, lt=1)
    seed: int = Field(0, ge=0, lt=1 << 31)

    @model_validator(mode="after")
    def _some_train(self) -> "RandomUsers":
        if self.valid_share + self.test_share >= 1:
            raise ValueError(f"valid_share={self.valid_share} and test_share={self.test_share} leave no user to train")
        return self

    def places(self, sequences: pl.DataFrame) -> pl.DataFrame:
        """train, valid, test of each user, from a hash of its id."""
        ids = sequences["user_id"].to_arrow(compat_level=pl.CompatLevel.oldest())
        drawn = hash64(ids, _USERS_KEY + self.seed) / np.float64(2**64)
        valid = drawn < self.valid_share
        test = ~valid & (drawn < self.valid_share + self.test_share)
        length = sequences["item_ids"].list.len().cast(pl.Int32).to_numpy()
        last = np.where(length >= 2, length - 1, NONE)
        return pl.DataFrame(
            {
                "train": np.where(valid | test, 0, length),
                "valid": np.where(valid, last, NONE),
                "test": np.where(test, last, NONE),
            },
            schema={"train": pl.Int32, "valid": pl.Int32, "test": pl.Int32},
        )


SplitRule = Annotated[LeaveOneOut | TimePoint | RandomUsers, Field(discriminator="rule")]


def parse_split(text: str) -> dict[str, object]:
    """`leave_one_out`, `time:VALID_FROM,TEST_FROM` (numbers or ISO dates) or `users:VALID_SHARE,TEST_SHARE`.

    Returns the fields of the rule, to be validated; `ValueError` for any other text.
    """
    name, _, rest = text.partition(":")
    parts = [part.strip() for part in rest.split(",")] if rest else []
    if name == "leave_one_out" and not parts:
        return {"rule": name}
    if name == "time" and len(parts) == 2:
        return {"rule": name, "valid_from": _moment(parts[0]), "test_from": _moment(parts[1])}
    if name == "users" and len(parts) == 2:
        return {"rule": name, "valid_share": parts[0], "test_share": parts[1]}
    raise ValueError(f"split {text!r}: give leave_one_out, time:VALID_FROM,TEST_FROM or users:VALID_SHARE,TEST_SHARE")


def _moment(text: str) -> int | str:
    """A number as a number, an ISO date as it is."""
    return int(text) if text.lstrip("-").isdigit() else text


def _comparable(time: int | str) -> int | datetime.datetime | None:
    """A date as `readers.times` takes it, None if it is none."""
    if isinstance(time, int):
        return time
    with suppress(ValueError):
        moment = datetime.datetime.fromisoformat(time.strip())
        return moment if moment.tzinfo else moment.replace(tzinfo=datetime.UTC)
    return None
