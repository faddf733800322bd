"""Ordered rows of a shard to one row a user: the dense ids and times of all it did."""

import polars as pl

from data_pipeline.config import PrepareConfig
from data_pipeline.hashing import hash64
from data_pipeline.splits import LeaveOneOut


def build(rows: pl.DataFrame, vocabulary: pl.DataFrame, config: PrepareConfig) -> pl.DataFrame:
    """One row a user of the k-core: user_id, item_ids list<int32>, timestamps list<int64>; in a keyed random order.

    `rows` are ordered and not yet reduced to the core; the vocabulary alone decides that. A user with enough rows on
    items of the core belongs to the core (else the core could be made larger), so no list of users has to travel.
    """
    core = rows.join(vocabulary.select("item_id", "dense_id"), on="item_id", maintain_order="left")
    sequences = core.group_by("user_id", maintain_order=True).agg(
        item_ids=pl.col("dense_id"), timestamps=pl.col("timestamp")
    )
    sequences = sequences.filter(pl.col("item_ids").list.len() >= config.min_user_interactions)
    users = sequences["user_id"].to_arrow(compat_level=pl.CompatLevel.oldest())
    # Another key than the shards', whose hashes agree in their last bits inside a shard.
    shuffled = pl.Series("key", hash64(users, config.seed + 1))
    return sequences.with_columns(shuffled).sort("key", "user_id").drop("key")


def train_counts(sequences: pl.DataFrame, split: LeaveOneOut) -> pl.DataFrame:
    """How often each item occurs among the interactions that train: dense_id int32, train_count int64."""
    head = pl.col("item_ids").list.head(split.train_lengths(pl.col("item_ids").list.len()))
    items = sequences.select(head.list.explode().alias("dense_id")).drop_nulls()
    return items.group_by("dense_id").agg(train_count=pl.len().cast(pl.Int64)).sort("dense_id")
