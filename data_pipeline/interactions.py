"""Rows of the log, cleaned: spread over shards by user, put in order, freed of duplicates, reduced to a k-core."""

import polars as pl

from data_pipeline.config import PrepareConfig
from data_pipeline.hashing import hash64

Dropped = dict[str, int]  # rows dropped, by reason


def partition(rows: pl.DataFrame, num_shards: int) -> pl.DataFrame:
    """`rows` with the column `shard` int32 of their user, sorted by it so that a shard is one slice."""
    hashes = hash64(rows["user_id"].to_arrow(compat_level=pl.CompatLevel.oldest()))
    shard = pl.Series("shard", (hashes % num_shards).astype("int32"))
    return rows.with_columns(shard).sort("shard")


def shard_slice(block: pl.DataFrame, shard: int) -> pl.DataFrame:
    """The rows of `shard` in a partitioned block."""
    start, stop = (int(block["shard"].search_sorted(shard, side=side)) for side in ("left", "right"))
    return block[start:stop]


def order(rows: pl.DataFrame, config: PrepareConfig) -> pl.DataFrame:
    """All rows of a shard by (user, time, position in the source), without duplicates.

    Returns shard, user_id, item_id, timestamp. Without a time column, timestamp is the place in the history, from 0.
    """
    rows = drop_duplicates(rows.sort("user_id", "timestamp", "position"), config)
    if config.time_column is None:
        rows = rows.with_columns(timestamp=pl.int_range(pl.len(), dtype=pl.Int64).over("user_id"))
    return rows.select("shard", "user_id", "item_id", "timestamp")


def drop_duplicates(rows: pl.DataFrame, config: PrepareConfig) -> pl.DataFrame:
    """Ordered `rows` without those that `config.duplicates` calls duplicates; the first of equals stays."""
    if config.duplicates == "exact":
        return rows.unique(["user_id", "item_id", "timestamp"], keep="first", maintain_order=True)
    if config.duplicates == "consecutive":
        same = [pl.col(column).eq_missing(pl.col(column).shift()) for column in ("user_id", "item_id")]
        return rows.filter(~pl.all_horizontal(same))
    return rows


def k_core(pairs: pl.DataFrame, min_user: int, min_item: int) -> tuple[pl.DataFrame, Dropped]:
    """The largest part of `pairs` (user_id, item_id) in which every user has `min_user` rows and every item `min_item`.

    Dropping a rare item can make a user too short and the other way round, so it repeats until nothing changes. The
    result does not depend on the order of dropping; the reasons do: a row for which both hold counts as the user's.
    """
    dropped = {"user_too_short": 0, "item_too_rare": 0}
    while True:
        counts = pairs.with_columns(
            user_ok=pl.len().over("user_id") >= min_user, item_ok=pl.len().over("item_id") >= min_item
        )
        kept = counts.filter("user_ok", "item_ok").select("user_id", "item_id")
        if kept.height == pairs.height:
            return kept, dropped
        short = pairs.height - int(counts["user_ok"].sum())
        dropped["user_too_short"] += short
        dropped["item_too_rare"] += pairs.height - kept.height - short
        pairs = kept
