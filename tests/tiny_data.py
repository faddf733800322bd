"""Small data sets in the prepared format, written or built without Ray, and the configuration of a run on them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

from data_pipeline import vocabulary
from data_pipeline.config import PrepareConfig
from data_pipeline.format import (
    MANIFEST,
    VOCABULARY,
    LedgerEntry,
    Manifest,
    RawFile,
    ShardFile,
    WrittenFile,
    parquet_bytes,
    shard_schema,
)
from data_pipeline.splits import LeaveOneOut
from genatt_dist import config as configuration
from genatt_dist.config import RunConfig
from genatt_dist.data.sequences import Sequences

NUM_ITEMS = 40


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


def write_prepared(directory: Path, lists: Sequence[Sequence[Any]], text_ids: bool = False) -> Manifest:
    """Publish the histories of users 100, 101 … (or "u00", "u01" … and text items) at `directory`."""
    users = [f"u{index:02d}" if text_ids else 100 + index for index in range(len(lists))]
    lists = [[f"{item:05d}" if text_ids else item for item in items] for items in lists]
    counted = vocabulary.build(pl.Series([item for items in lists for item in items]))
    dense = dict(zip(counted["item_id"].to_list(), counted["dense_id"].to_list(), strict=True))
    split = LeaveOneOut()
    trained = [dense[item] for items in lists for item in items[: split.train_length(len(items))]]
    train_counts = pl.Series("dense_id", trained, dtype=pl.Int32).to_frame().group_by("dense_id").len("train_count")
    words = vocabulary.finish(counted, train_counts.with_columns(pl.col("train_count").cast(pl.Int64)))

    def write(path: str, content: bytes) -> WrittenFile:
        (directory / path).parent.mkdir(parents=True, exist_ok=True)
        (directory / path).write_bytes(content)
        return WrittenFile(path=path, bytes=len(content), sha256=hashlib.sha256(content).hexdigest())

    files = []
    for shard in range(2):
        mine = list(range(shard, len(lists), 2))
        table = pa.table(
            {
                "user_id": [users[user] for user in mine],
                "item_ids": [[dense[item] for item in lists[user]] for user in mine],
                "timestamps": [list(range(len(lists[user]))) for user in mine],
            },
            schema=shard_schema(pa.string() if text_ids else pa.int64()),
        )
        written = write(f"shards/part-{shard:05d}.parquet", parquet_bytes(table, row_group_size=8))
        count = sum(len(lists[user]) for user in mine)
        files.append(ShardFile(**written.model_dump(), users=len(mine), interactions=count))
    config = PrepareConfig(source="log.csv", out=str(directory), min_user_interactions=1, min_item_interactions=1)
    total = sum(map(len, lists))
    manifest = Manifest(
        name="tiny",
        num_users=len(lists),
        num_items=counted.height,
        num_interactions=total,
        split=split,
        files=tuple(files),
        vocabulary=write(VOCABULARY, parquet_bytes(words, row_group_size=64)),
        source=(RawFile(path="log.csv", bytes=1),),
        config=config.recorded(),
        config_hash=config.hash(),
        ledger=(LedgerEntry(stage="read", rows_in=total, rows_out=total),),
    )
    (directory / MANIFEST).write_bytes(manifest.to_json())
    return manifest


def sequences_of(lists: Sequence[Sequence[int]], num_items: int | None = None) -> Sequences:
    """Sequences in memory alone: dense ids of each user, oldest first."""
    items = np.array([item for items in lists for item in items], np.int32)
    offsets = np.cumsum([0, *map(len, lists)])
    num_items = num_items or int(items.max())
    manifest = Manifest.model_construct(name="in memory", split=LeaveOneOut(), num_items=num_items)
    return Sequences(items, offsets, pa.array(range(len(lists))), np.zeros(num_items + 1, np.int64), manifest, "")


def numbered(lengths: Sequence[int]) -> Sequences:
    """Users of these lengths in which every interaction has an item of its own: an id names user and place."""
    ends = np.cumsum(lengths)
    return sequences_of([list(range(end - length + 1, end + 1)) for length, end in zip(lengths, ends, strict=True)])


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
