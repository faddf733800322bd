"""The k-core over many shards: what every round computes in a shard, and what the driver keeps between rounds.

The largest part of the log in which every user has `min_user` rows and every item `min_item`. An item's rows lie in all
shards, a user's in one. So the driver holds the counts of items, and a round is: items that have become too rare die;
shard by shard, users left with too few rows on living items die; the rows they take along are subtracted from the
counts of items. No user dies: done. The result does not depend on the order of dropping; the reasons do: a row counts
as its item's if that died first.

Legend: I items (by code), U users of a shard, N rows of a shard.
"""

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Codes = npt.NDArray[np.int32]
Flags = npt.NDArray[np.bool_]


@dataclass
class Items:
    """What the driver knows: living rows of each item int64 [I], which items live [I], which never die [I]."""

    counts: Ints
    min_item: int
    exempt: Flags | None = None
    alive: Flags = field(init=False)

    def __post_init__(self) -> None:
        self.alive = np.ones(len(self.counts), np.bool_)

    def bury(self) -> int:
        """Lets items die that are too rare by now; how many those are."""
        rare = self.alive & (self.counts < self.min_item)
        if self.exempt is not None:
            rare &= ~self.exempt
        self.alive &= ~rare
        return int(rare.sum())

    def subtract(self, removed: "Removed") -> None:
        """Takes the rows of dead users from the counts of their items."""
        self.counts[removed.codes] -= removed.counts


@dataclass(frozen=True)
class Removed:
    """What died with users in one round of one shard: codes [K] and counts [K] of the items in their rows."""

    users: int
    codes: Codes
    counts: Ints

    @property
    def rows(self) -> int:
        """How many rows died with them."""
        return int(self.counts.sum())


def starts(lengths: Ints) -> Ints:
    """Where each user's rows begin: int64 [U]."""
    return np.cumsum(lengths) - lengths


def living_rows(codes: Codes, lengths: Ints, items: Flags) -> Ints:
    """Rows on living items of each user: int64 [U]."""
    return rows_of_users(items[codes], lengths)


def rows_of_users(rows: Flags, lengths: Ints) -> Ints:
    """How many of the flagged `rows` [N] each user has: int64 [U]. Every user has a row, as `reduceat` needs."""
    return np.add.reduceat(rows.astype(np.int64), starts(lengths)) if len(lengths) else lengths


def bury_users(
    codes: Codes, lengths: Ints, users: Flags, items: Flags, min_user: int, exempt: Flags | None = None
) -> tuple[Flags, Removed]:
    """The users [U] that still live, and what the others took along. codes [N] lie by user, lengths [U] says how."""
    short = users & (living_rows(codes, lengths, items) < min_user)
    if exempt is not None:
        short &= ~exempt
    lost = codes[np.repeat(short, lengths)] if short.any() else codes[:0]
    found, counts = np.unique(lost[items[lost]], return_counts=True)
    return users & ~short, Removed(int(short.sum()), found, counts.astype(np.int64))
