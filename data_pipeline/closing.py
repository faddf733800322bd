"""What is looked at when all shards are written: whether the numbers agree, and whether the split holds out anybody."""

from collections.abc import Sequence
from itertools import compress

import numpy as np

from data_pipeline.errors import GenattError
from data_pipeline.k_core import Ints
from data_pipeline.splits import LeaveOneOut, RandomUsers, TimePoint
from data_pipeline.tasks import Written
from data_pipeline.vocabulary import Vocabulary


def defect(said: str) -> GenattError:
    """The error of numbers that contradict each other, which no option can mend."""
    return GenattError(
        f"the ledger does not add up: {said}: nothing is published; "
        "this is a defect, please report it with the options used"
    )


def check_counts(words: Vocabulary, train: Ints, rows: int, trained: int) -> None:
    """Refuses a vocabulary that contradicts the shards, each counted on its own way.

    Parameters
    ----------
    train
        How often each dense id trains [V + 1].
    rows
        That items are counted on: all that are written, and those beyond `max_history` in any version.
    trained
        Rows that train, by the index of all shards.

    Raises
    ------
    GenattError
        See `defect`.
    """
    counted = int(words.table["count"].sum())
    if counted != rows:
        raise defect(f"items are counted on {counted} rows, there are {rows}")
    if int(train.sum()) != trained:
        raise defect(f"items train on {int(train.sum())} rows, by the index there are {trained}")
    if words.buckets is None:
        return
    sums = np.zeros(words.size + 1, np.int64)
    np.add.at(sums, words.buckets["dense_id"].to_numpy(), words.buckets["count"].to_numpy())
    counts = words.table["count"].to_numpy()
    if len(wrong := np.flatnonzero(sums[1:] != counts)):
        first = int(wrong[0])
        raise defect(f"items of bucket {first + 1} are counted on {sums[first + 1]} rows, there are {counts[first]}")


def split_notes(split: LeaveOneOut | TimePoint | RandomUsers, written: Sequence[Written], trained: int) -> list[str]:
    """A line for each part of `split` that is empty; `trained`: rows that train.

    Targets are told of only where every shard's are known: after an append, copied shards' are not.
    """
    said, mend = _words(split)
    notes = [] if trained else [f"split {said}: nothing trains: {mend}"]
    targets = [one.targets for one in written if one.targets is not None]
    if len(targets) == len(written):
        empty = compress(("valid", "test"), (sum(part) == 0 for part in zip(*targets, strict=True)))
        if parts := " or ".join(empty):
            notes.append(f"split {said}: no user has a {parts} target: {mend}")
    return notes


def _words(split: LeaveOneOut | TimePoint | RandomUsers) -> tuple[str, str]:
    """`split` as it is typed, and what to do where it leaves a part empty."""
    if isinstance(split, TimePoint):
        rule = "what is before the first time trains, a target follows another interaction of its user"
        return f"time:{split.valid_from},{split.test_from}", f"{rule}: choose times inside those of the log"
    if isinstance(split, RandomUsers):
        rule = "few users, or users with one interaction, for these shares"
        return f"users:{split.valid_share:g},{split.test_share:g}", f"{rule}: choose others"
    return "leave_one_out", f"no user has {split.min_length} interactions on items with ids: choose another split"
