"""Ordered rows of a shard to one row a user: the dense ids and times of all it did.

Legend: N rows and U users of the shard; sequences are flat arrays with the length of each.
"""

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa

from data_pipeline.format import INDEX_SCHEMA, shard_schema
from data_pipeline.k_core import Flags, Ints, starts
from data_pipeline.splits import LeaveOneOut, RandomUsers, TimePoint


@dataclass(frozen=True)
class Sequences:
    """users [U] ids; lengths int64 [U]; items int32, times int64 and perhaps weights float32 [N], by user and time."""

    users: pa.Array
    lengths: Ints
    items: npt.NDArray[np.int32]
    times: Ints
    weights: npt.NDArray[np.float32] | None = None

    def where(self, rows: Flags) -> "Sequences":
        """Without the other rows [N], and without users that have none left."""
        lengths = np.add.reduceat(rows.astype(np.int64), starts(self.lengths)) if len(self.lengths) else self.lengths
        left = lengths > 0
        return replace(
            self,
            users=self.users.filter(pa.array(left)),
            lengths=lengths[left],
            items=self.items[rows],
            times=self.times[rows],
            weights=None if self.weights is None else self.weights[rows],
        )

    def newest(self, limit: int | None) -> "Sequences":
        """Each user's newest `limit` rows."""
        if limit is None or not len(self.lengths) or int(self.lengths.max()) <= limit:
            return self
        to_come = np.repeat(np.cumsum(self.lengths), self.lengths) - np.arange(len(self.items))
        return self.where(to_come <= limit)

    def table(self) -> pa.Table:
        """As a shard has them (`format.shard_schema`)."""
        offsets = pa.array(np.concatenate([[0], np.cumsum(self.lengths)]).astype(np.int32))
        values = [self.items, self.times] + ([] if self.weights is None else [self.weights])
        user_type = pa.string() if pa.types.is_large_string(self.users.type) else self.users.type
        columns = [self.users.cast(user_type), *(pa.ListArray.from_arrays(offsets, pa.array(each)) for each in values)]
        return pa.Table.from_arrays(columns, schema=shard_schema(user_type, weighted=self.weights is not None))


def index(
    table: pa.Table, split: LeaveOneOut | TimePoint | RandomUsers, out_of_vocabulary: int | None = None
) -> pa.Table:
    """length, train, valid, test of each user of a shard's `table`. The id that rare items share is never a target."""
    rows = pl.DataFrame(table)
    places = split.places(rows).with_columns(length=rows["item_ids"].list.len().cast(pl.Int32))
    if out_of_vocabulary is not None:
        targets = {
            name: rows["item_ids"].list.get(places[name].clip(lower_bound=0), null_on_oob=True) == out_of_vocabulary
            for name in ("valid", "test")
        }
        places = places.with_columns(
            pl.when(shared).then(-1).otherwise(places[name]).cast(pl.Int32).alias(name)
            for name, shared in targets.items()
        )
    return places.select(INDEX_SCHEMA.names).to_arrow(compat_level=pl.CompatLevel.oldest()).cast(INDEX_SCHEMA)


def train_counts(table: pa.Table, places: pa.Table) -> tuple[Ints, Ints]:
    """Items that train in a shard, and how often each: dense ids and counts int64, both [K]."""
    lists = table["item_ids"].combine_chunks()
    lengths, train = places["length"].to_numpy().astype(np.int64), places["train"].to_numpy()
    place = np.arange(int(lengths.sum())) - np.repeat(starts(lengths), lengths)
    counts = np.bincount(lists.flatten().to_numpy()[place < np.repeat(train, lengths)])
    items = np.flatnonzero(counts)
    return items, counts[items]
