"""The three functions that run as Ray tasks: each takes a block with one number, and makes a block of rows.

read_block     number of a chunk of a raw file   the chunk's rows, sorted by shard
order_shard    number of a shard                 its slices of all those blocks, in order, without duplicates
write_shard    number of an ordered shard        a Parquet file of sequences, and one row that describes it
"""

import hashlib

import polars as pl
import pyarrow as pa
import ray

from data_pipeline import interactions, sequences
from data_pipeline.config import PrepareConfig
from data_pipeline.format import parquet_bytes, shard_schema
from data_pipeline.readers import Plan, read_chunk
from data_pipeline.splits import LeaveOneOut
from data_pipeline.storage import write_bytes

SHARD_PATH = "shards/part-{:05d}.parquet"


def read_block(batch: pa.Table, plan: Plan, config: PrepareConfig) -> pa.Table:
    """Reads the chunk whose number is in `batch["chunk"]`."""
    rows = read_chunk(plan, plan.chunks[batch["chunk"][0].as_py()], config)
    return _arrow(interactions.partition(rows, config.num_shards))


def order_shard(batch: pa.Table, blocks: list[ray.ObjectRef], config: PrepareConfig) -> pa.Table:
    """Gathers the shard whose number is in `batch["shard"]` from all `blocks`.

    Not Ray Data's own hash shuffle: that starts actors, this reads shared memory.
    """
    shard = batch["shard"][0].as_py()
    parts = [interactions.shard_slice(_polars(block), shard) for block in ray.get(blocks)]
    return _arrow(interactions.order(pl.concat(parts), config))


def write_shard(
    batch: pa.Table,
    shards: list[ray.ObjectRef],
    vocabulary: ray.ObjectRef,
    directory: str,
    config: PrepareConfig,
    split: LeaveOneOut,
) -> pa.Table:
    """Writes one of the ordered `shards`. The row returned is a `format.ShardFile` and its items' training counts."""
    rows = _polars(ray.get(shards[batch["block"][0].as_py()]))
    built = sequences.build(rows, _polars(ray.get(vocabulary)), config)
    counts = sequences.train_counts(built, split)
    user_type = pa.string() if built["user_id"].dtype == pl.String else pa.int64()
    content = parquet_bytes(_arrow(built).cast(shard_schema(user_type)), config.row_group_size)
    path = SHARD_PATH.format(rows["shard"][0])
    if built.height:
        write_bytes(f"{directory}/{path}", content)
    return _arrow(
        pl.DataFrame(
            {
                "path": [path],
                "users": [built.height],
                "interactions": [int(built["item_ids"].list.len().sum())],
                "bytes": [len(content)],
                "sha256": [hashlib.sha256(content).hexdigest()],
                "dense_id": [counts["dense_id"]],
                "train_count": [counts["train_count"]],
            },
            schema_overrides={"dense_id": pl.List(pl.Int32), "train_count": pl.List(pl.Int64)},
        )
    )


def _polars(table: pa.Table) -> pl.DataFrame:
    return pl.DataFrame(table)


def _arrow(frame: pl.DataFrame) -> pa.Table:
    return frame.to_arrow(compat_level=pl.CompatLevel.oldest())
