"""A prepared data set of a few hundred users, written in the contract's format without Ray."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pyarrow as pa

from data_pipeline.format import (
    MANIFEST,
    VOCABULARY,
    LedgerEntry,
    Manifest,
    ShardFile,
    WrittenFile,
    parquet_bytes,
    shard_schema,
)
from data_pipeline.splits import LeaveOneOut

NUM_USERS = 240
NUM_ITEMS = 200  # with the padding row 201: two ranks get 101 and 100 rows
SHORTEST, LONGEST = 2, 20


def write(path: Path, seed: int = 0) -> Path:
    """Users who step 1 or 3 items on most of the time, so that there is something to learn; returns `path`."""
    random = np.random.default_rng(seed)
    histories = [_history(random, int(random.integers(SHORTEST, LONGEST + 1))) for _ in range(NUM_USERS)]
    split = LeaveOneOut()
    counts, train_counts = np.zeros(NUM_ITEMS + 1, np.int64), np.zeros(NUM_ITEMS + 1, np.int64)
    for history in histories:
        np.add.at(counts, history, 1)
        np.add.at(train_counts, history[: split.train_length(len(history))], 1)
    ids = np.arange(1, NUM_ITEMS + 1)
    vocabulary = pa.table({"item_id": ids, "dense_id": ids, "count": counts[1:], "train_count": train_counts[1:]})

    files = []
    for number, users in enumerate(np.array_split(np.arange(NUM_USERS), 2)):
        lists = [histories[user] for user in users]
        times = [np.arange(len(history)) for history in lists]
        rows = pa.table([pa.array(users), pa.array(lists), pa.array(times)], schema=shard_schema(pa.int64()))
        written = _write(path, f"shards/part-{number:05d}.parquet", rows)
        files.append(ShardFile(**dict(written), users=len(users), interactions=sum(map(len, lists))))
    total = sum(map(len, histories))
    manifest = Manifest(
        name="tiny",
        num_users=NUM_USERS,
        num_items=NUM_ITEMS,
        num_interactions=total,
        split=split,
        files=tuple(files),
        vocabulary=_write(path, VOCABULARY, vocabulary),
        source=(),
        config={"min_user_interactions": 1, "min_item_interactions": 1, "seed": seed},
        config_hash=f"seed {seed}",
        ledger=(LedgerEntry(stage="read", rows_in=total, rows_out=total),),
    )
    (path / MANIFEST).write_bytes(manifest.to_json())
    return path


def _history(random: np.random.Generator, length: int) -> np.ndarray:
    steps = np.where(random.random(length) < 0.8, random.choice((1, 3)), random.integers(0, NUM_ITEMS, length))
    return (1 + np.cumsum(steps) % NUM_ITEMS).astype(np.int32)


def _write(path: Path, name: str, table: pa.Table) -> WrittenFile:
    content = parquet_bytes(table, row_group_size=64)
    (path / name).parent.mkdir(parents=True, exist_ok=True)
    (path / name).write_bytes(content)
    return WrittenFile(path=name, bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
