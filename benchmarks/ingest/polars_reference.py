"""What the pipeline is measured against: the same preparation as one Polars script, in one process, all in memory.

    python -m benchmarks.ingest.polars_reference --source s3://bucket/log/*.parquet --out DIR --num-shards 16

Reads user_id, item_id, timestamp; k-core; vocabulary; sequences by (user, time, place in the source); leave-one-out;
shards, their indexes and the vocabulary as `data_pipeline.format` describes them (no manifest, no checksums). S3 is set
up by the environment (AWS_ENDPOINT_URL, …). The way of each step is the fastest of those tried: one item and one user
count and then only what falls away instead of counting anew each round, `is_in` of the few rare ids instead of a join,
rows sorted inside their group instead of a sort of the whole log by two keys, no dictionaries in the shards.

Prints one JSON line: seconds of the imports, of each step, and of all steps; CPU seconds of all steps.
"""

from __future__ import annotations

import time

_BEGAN = time.perf_counter()

import argparse  # noqa: E402
import json  # noqa: E402
from collections.abc import Callable  # noqa: E402
from concurrent.futures import ThreadPoolExecutor  # noqa: E402
from functools import partial  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import polars as pl  # noqa: E402

from data_pipeline.config import PrepareConfig  # noqa: E402
from data_pipeline.format import INDEX, SHARD, VOCABULARY  # noqa: E402
from data_pipeline.hashing import hash64  # noqa: E402
from data_pipeline.splits import LeaveOneOut  # noqa: E402

IMPORT_SECONDS = time.perf_counter() - _BEGAN

COLUMNS = ("user_id", "item_id", "timestamp")
write_parquet = partial(pl.DataFrame.write_parquet, compression="zstd", compression_level=3)


def read(source: str) -> pl.DataFrame:
    """The log, in the order of its files and rows."""
    return pl.scan_parquet(source).select(COLUMNS).collect()


def k_core(log: pl.DataFrame, min_user: int, min_item: int) -> tuple[pl.DataFrame, pl.DataFrame]:
    """The rows of the core in their order, and its items with their counts: item_id, len."""
    least = {"user_id": min_user, "item_id": min_item}
    counts = {column: log.lazy().group_by(column).len().collect(engine="streaming") for column in least}
    while True:
        before = log.height
        for column, other in (("item_id", "user_id"), ("user_id", "item_id")):
            enough = pl.col("len") >= least[column]
            rare = counts[column].filter(~enough)[column]
            if rare.is_empty():
                continue
            falls = log.select(pl.col(column).is_in(rare.implode())).to_series()
            lost = log.filter(falls).group_by(other).agg(lost=pl.len())
            log = log.filter(~falls)
            counts[column] = counts[column].filter(enough)
            left = counts[other].join(lost, on=other, how="left")
            counts[other] = left.select(other, len=pl.col("len") - pl.col("lost").fill_null(0))
        if log.height == before:
            return log, counts["item_id"].filter(pl.col("len") > 0)


def vocabulary_of(counts: pl.DataFrame) -> pl.DataFrame:
    """item_id, dense_id, count: by count, falling, then by id."""
    ranked = counts.sort("len", "item_id", descending=[True, False])
    dense_id = pl.int_range(1, pl.len() + 1, dtype=pl.Int32)
    return ranked.select("item_id", dense_id=dense_id, count=pl.col("len").cast(pl.Int64))


def encode(log: pl.DataFrame, vocabulary: pl.DataFrame) -> pl.DataFrame:
    """user_id, dense_id, timestamp, in the order of `log`."""
    ids = vocabulary.lazy().select("item_id", "dense_id")
    encoded = log.lazy().join(ids, on="item_id", how="left", maintain_order="left")
    return encoded.select("user_id", "dense_id", "timestamp").collect()


def sequences_of(rows: pl.DataFrame) -> pl.DataFrame:
    """user_id, item_ids, timestamps: one row a user, oldest first. A group keeps the order of its rows."""
    item_ids, timestamps = pl.col("dense_id"), pl.col("timestamp")
    if not rows["timestamp"].is_sorted():
        item_ids, timestamps = (c.sort_by("timestamp", maintain_order=True) for c in (item_ids, timestamps))
    return rows.lazy().group_by("user_id").agg(item_ids=item_ids, timestamps=timestamps).collect()


def train_counts(sequences: pl.DataFrame, vocabulary: pl.DataFrame) -> pl.DataFrame:
    """`vocabulary` with train_count: `count` less what is held out, for that is two rows a user."""
    places = LeaveOneOut().places(sequences)
    held_out = pl.col("item_ids").list.tail(pl.col("held_out"))
    held = sequences.select("item_ids", held_out=pl.col("item_ids").list.len() - places["train"]).select(
        dense_id=held_out.list.explode()
    )
    lost = held.drop_nulls().group_by("dense_id").agg(lost=pl.len().cast(pl.Int64))
    joined = vocabulary.join(lost, on="dense_id", how="left", maintain_order="left")
    return joined.with_columns(train_count=pl.col("count") - pl.col("lost").fill_null(0)).drop("lost")


def write(sequences: pl.DataFrame, vocabulary: pl.DataFrame, out: Path, num_shards: int, row_group_size: int) -> None:
    """Users by the hash of their id over the shards, in a keyed order inside each."""
    for name in (SHARD, INDEX, VOCABULARY):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
    users = sequences["user_id"].to_arrow(compat_level=pl.CompatLevel.oldest())
    placed = pl.DataFrame(
        {
            "shard": pl.Series(hash64(users) % num_shards, dtype=pl.Int64),
            "key": hash64(users, 1),
            "user_id": sequences["user_id"],
        }
    ).with_row_index("row")
    ordered = placed.sort("shard", "key", "user_id").partition_by("shard", maintain_order=True)

    def write_shard(rows: pl.DataFrame) -> None:
        number, shard = rows["shard"][0], sequences[rows["row"]]
        length = shard.select(length=pl.col("item_ids").list.len().cast(pl.Int32))
        index = pl.concat([length, LeaveOneOut().places(shard)], how="horizontal")
        write_parquet(shard, out / SHARD.format(number), row_group_size=row_group_size)
        write_parquet(index, out / INDEX.format(number), row_group_size=row_group_size)

    with ThreadPoolExecutor(pl.thread_pool_size()) as pool:
        list(pool.map(write_shard, ordered))
    write_parquet(vocabulary, out / VOCABULARY, row_group_size=1 << 16)


def main() -> None:
    """Run the steps and print their seconds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    defaults = PrepareConfig.model_fields
    parser.add_argument("--source", required=True, help="file or glob, local or s3://")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--num-shards", type=int, required=True)
    parser.add_argument("--row-group-size", type=int, default=defaults["row_group_size"].default)
    parser.add_argument("--min-user", type=int, default=defaults["min_user_interactions"].default)
    parser.add_argument("--min-item", type=int, default=defaults["min_item_interactions"].default)
    arguments = parser.parse_args()

    steps: dict[str, float] = {}

    def timed(name: str, step: Callable[..., Any], *values: Any) -> Any:
        began = time.perf_counter()
        result = step(*values)
        steps[name] = round(time.perf_counter() - began, 3)
        return result

    began, cpu_began = time.perf_counter(), time.process_time()
    log = timed("read", read, arguments.source)
    rows_in = log.height
    log, counts = timed("k-core", k_core, log, arguments.min_user, arguments.min_item)
    vocabulary = timed("vocabulary", vocabulary_of, counts)
    rows = timed("encode", encode, log, vocabulary)
    del log
    sequences = timed("sequences", sequences_of, rows)
    del rows
    vocabulary = timed("train counts", train_counts, sequences, vocabulary)
    timed("write", write, sequences, vocabulary, arguments.out, arguments.num_shards, arguments.row_group_size)
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu_began
    print(
        json.dumps(
            {
                "import_seconds": round(IMPORT_SECONDS, 3),
                "seconds": round(seconds, 3),
                "steps": steps,
                "rows_in": rows_in,
                "rows_out": int(vocabulary["count"].sum()),
                "cpu_seconds": {"driver": round(cpu_seconds, 2)},
                "threads": pl.thread_pool_size(),
            }
        )
    )


if __name__ == "__main__":
    main()
