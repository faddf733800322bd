"""Small data sets in the prepared format, written or built without Ray, and the configuration of a run on them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

from data_pipeline.config import PrepareConfig
from data_pipeline.format import (
    INDEX,
    INDEX_SCHEMA,
    MANIFEST,
    SHARD,
    VOCABULARY,
    LedgerEntry,
    Manifest,
    RawFile,
    ShardFile,
    WrittenFile,
    parquet_bytes,
    shard_schema,
)
from data_pipeline.splits import LeaveOneOut, SplitRule
from genatt_dist import config as configuration
from genatt_dist.config import RunConfig
from genatt_dist.data.batches import TrainingBatches
from genatt_dist.data.sequences import Sequences
from genatt_dist.data.windows import Windows, windows_of

NUM_ITEMS = 40
LEAVE_ONE_OUT = LeaveOneOut()


def histories(seed: int = 0, users: int = 48) -> list[list[int]]:
    """Original item ids (multiples of 10) of each user, oldest first; among them users with 1 and 2 interactions."""
    draw = np.random.default_rng(seed)
    lengths = [1, 2, 2, 3, *draw.integers(3, 13, users - 4)]
    popularity = 1 / np.arange(1, NUM_ITEMS + 1)
    lists = [
        (10 * (1 + draw.choice(NUM_ITEMS, length, p=popularity / popularity.sum()))).tolist() for length in lengths
    ]
    lists[-1] = [10 * item for item in range(1, NUM_ITEMS + 1)]  # every item is there, and somebody has seen them all
    return lists


def write_prepared(
    directory: Path,
    lists: Sequence[Sequence[Any]],
    text_ids: bool = False,
    split: SplitRule = LEAVE_ONE_OUT,
    num_shards: int = 2,
    row_group_size: int = 8,
    times: Sequence[Sequence[int]] | None = None,
    attributes: Mapping[str, Sequence[Any]] | None = None,
) -> Manifest:
    """Publish the histories of users 100, 101 … (or "u00", "u01" … and text items) at `directory`.

    User number i is row i // num_shards of shard i % num_shards, and its times are 0, 1, 2 … without a unit, or `times`
    in seconds. attributes: columns of the vocabulary by name, by dense id.
    """
    frame = pl.DataFrame(
        {
            "user_id": [f"u{index:02d}" if text_ids else 100 + index for index in range(len(lists))],
            "items": [[f"{item:05d}" if text_ids else item for item in items] for items in lists],
            "timestamps": times or [list(range(len(items))) for items in lists],
        },
        schema_overrides={"timestamps": pl.List(pl.Int64)},
    )
    events = frame.select(user=pl.int_range(pl.len()), item_id=pl.col("items")).explode("item_id")
    counts = events.group_by("item_id").len("count").sort("count", "item_id", descending=[True, False])
    words = counts.with_columns(pl.int_range(1, pl.len() + 1, dtype=pl.Int32).alias("dense_id"))
    dense = events.join(words, on="item_id", maintain_order="left").group_by("user", maintain_order=True)
    frame = frame.with_columns(dense.agg("dense_id")["dense_id"].alias("item_ids")).drop("items")
    places = pl.concat(
        (frame.select(length=pl.col("item_ids").list.len().cast(pl.Int32)), split.places(frame)), how="horizontal"
    )
    heads = frame.with_columns(places["train"]).select(pl.col("item_ids").list.head(pl.col("train")))
    trained = heads.filter(pl.col("item_ids").list.len() > 0).explode("item_ids").rename({"item_ids": "dense_id"})
    words = words.join(
        trained.group_by("dense_id").len("train_count"), on="dense_id", how="left", maintain_order="left"
    )
    others = pa.table(dict(attributes or {}))
    words = words.with_columns(pl.Series(name, values) for name, values in (attributes or {}).items())
    columns = (*others.column_names, "item_id", "dense_id", pl.col("count", "train_count").fill_null(0).cast(pl.Int64))

    def write(path: str, rows: pl.DataFrame, schema: pa.Schema, size: int) -> WrittenFile:
        table = rows.to_arrow(compat_level=pl.CompatLevel.oldest())
        content = parquet_bytes(table.cast(schema), size)
        (directory / path).parent.mkdir(parents=True, exist_ok=True)
        (directory / path).write_bytes(content)
        return WrittenFile(path=path, bytes=len(content), sha256=hashlib.sha256(content).hexdigest())

    files = []
    id_type = pa.string() if text_ids else pa.int64()
    schema = shard_schema(id_type)
    catalogue = [("item_id", id_type), ("dense_id", pa.int32()), ("count", pa.int64()), ("train_count", pa.int64())]
    for shard in range(min(num_shards, len(lists))):
        mine, index = frame.gather_every(num_shards, shard), places.gather_every(num_shards, shard)
        files.append(
            ShardFile(
                **write(SHARD.format(shard), mine.select(schema.names), schema, row_group_size).model_dump(),
                shard=shard,
                users=mine.height,
                interactions=int(index["length"].sum()),
                index=write(INDEX.format(shard), index.select(INDEX_SCHEMA.names), INDEX_SCHEMA, 1 << 20),
            )
        )
    config = PrepareConfig(source="log.csv", out=str(directory), min_user_interactions=1, min_item_interactions=1)
    manifest = Manifest(
        name="tiny",
        num_users=len(lists),
        num_items=words.height,
        num_interactions=events.height,
        num_shards=num_shards,
        row_group_size=row_group_size,
        split=split,
        time_unit="s" if times else None,
        files=tuple(files),
        vocabulary=write(VOCABULARY, words.select(*columns), pa.schema([*others.schema, *catalogue]), 64),
        source=(RawFile(path="log.csv", bytes=1),),
        config=config.recorded(),
        config_hash=config.hash(),
        ledger=(LedgerEntry(stage="read", rows_in=events.height, rows_out=events.height),),
    )
    (directory / MANIFEST).write_bytes(manifest.to_json())
    return manifest


def sequences_of(
    lists: Sequence[Sequence[int]], num_items: int | None = None, row_group_size: int | None = None
) -> Sequences:
    """Sequences in memory alone: dense ids of each user, oldest first; split leave-one-out."""
    items = np.array([item for items in lists for item in items], np.int32)
    manifest = Manifest.model_construct(  # type: ignore[call-arg]
        name="in memory", split=LEAVE_ONE_OUT, num_items=num_items or int(items.max())
    )
    places = LEAVE_ONE_OUT.places(pl.DataFrame({"item_ids": lists}, schema={"item_ids": pl.List(pl.Int32)}))
    return Sequences.of(items, [len(items) for items in lists], places.to_numpy().T, manifest, row_group_size)


def numbered(lengths: Sequence[int], row_group_size: int | None = None) -> Sequences:
    """Users of these lengths in which every interaction has an item of its own: an id names user and place."""
    ends = np.cumsum(lengths)
    lists = [list(range(end - length + 1, end + 1)) for length, end in zip(lengths, ends, strict=True)]
    return sequences_of(lists, row_group_size=row_group_size)


def all_windows(batches: TrainingBatches) -> Windows:
    """The training windows of all users, as batches have to hold them."""
    sequences = batches.sequences
    return windows_of(np.arange(sequences.num_users), sequences.offsets, sequences.train, batches.data)


def run_tree(path: Path | str) -> dict[str, Any]:
    """A run that trains on `path` in a second or two."""
    return {
        "data": {"path": str(path), "max_len": 8},
        "model": {"hidden_size": 16, "num_blocks": 1, "dropout": 0.1},
        "training": {"epochs": 2, "batch_sequences": 16, "learning_rate": 0.01},
        "evaluation": {"batch_users": 32, "chunk_items": 16},
    }


def run_config(path: Path | str, **sections: dict[str, Any]) -> RunConfig:
    """`run_tree` with changes in its sections."""
    tree = run_tree(path)
    for name, values in sections.items():
        tree[name] = tree.get(name, {}) | values
    return configuration.parse(tree, "of a test")
