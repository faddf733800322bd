"""The shard of each row, by its user, and the rows of several blocks put apart by shard."""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import polars as pl
import pyarrow as pa

from data_pipeline.clean import Dropped
from data_pipeline.hashing import hash64
from data_pipeline.narrow import narrow

REASONS = ("outside_time_range", "event_without_weight")  # numbered: -1, -2 … in the column `shard`


@dataclass(frozen=True)
class Counted:
    """How many rows are there, and how many were dropped before, by reason."""

    rows: int
    dropped: Dropped


def tag(rows: pl.DataFrame, dropped: Dropped, num_shards: int) -> pa.Table:
    """`rows` with the column `shard` int32, and a row for each reason that says how many rows were dropped for it.

    Such a row has a negative shard, -1 - its place in `REASONS`, and the count in `timestamp`: what travels with the
    rows cannot be lost or counted twice, whatever becomes of the blocks and the tasks that make them.
    """
    hashes = hash64(rows["user_id"].to_arrow(compat_level=pl.CompatLevel.oldest()))
    tagged = rows.with_columns(pl.Series("shard", (hashes % np.uint64(num_shards)).astype(np.int32)))
    table = tagged.to_arrow(compat_level=pl.CompatLevel.oldest())
    counts = {-1 - REASONS.index(reason): count for reason, count in dropped.items() if count}
    if not counts:
        return table
    told = rows.clear(n=len(counts)).with_columns(
        pl.Series("shard", list(counts), pl.Int32), pl.Series("timestamp", list(counts.values()), pl.Int64)
    )
    filled = told.with_columns(pl.col(name).fill_null("" if told[name].dtype == pl.String else 0) for name in ids(told))
    return pa.concat_tables([table, filled.to_arrow(compat_level=pl.CompatLevel.oldest())])


def ids(rows: pl.DataFrame) -> list[str]:
    """The columns that must not be null."""
    return [name for name in rows.columns if name not in ("shard", "timestamp")]


def split(blocks: list[pa.Table], num_shards: int) -> tuple[Counted, list[pa.Table]]:
    """Counts of the rows of tagged `blocks`, and the rows by shard (narrowed), each in the order they came in.

    One stable sort of small integers and one gather, then slices: their cost does not depend on the number of shards.
    """
    table = pa.concat_tables(blocks)
    shard = table["shard"].to_numpy()
    order = np.argsort(shard.astype(np.int16) if num_shards < 1 << 15 else shard, kind="stable")  # 16 bits: radix sort
    bounds = np.searchsorted(shard[order], np.arange(num_shards + 1))
    rows = pl.DataFrame(table.drop_columns(["shard"]))
    told = pl.DataFrame({"shard": shard, "rows": rows["timestamp"]})[order[: bounds[0]]].group_by("shard").sum()
    dropped = {REASONS[-1 - shard]: rows for shard, rows in told.sort("shard").iter_rows()}
    slices = narrow(rows[order].to_arrow(compat_level=pl.CompatLevel.oldest()))
    counted = Counted(int(bounds[-1] - bounds[0]), dropped)
    return counted, [slices[start:stop] for start, stop in pairwise(bounds)]
