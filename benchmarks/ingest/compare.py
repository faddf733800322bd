"""Are two prepared directories equal in content? One shard at a time, so that memory does not grow with the log."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import pyarrow.parquet as pq

from data_pipeline.format import INDEX, SHARD, VOCABULARY

COLUMNS = ("item_id", "dense_id", "count", "train_count")


def difference(one: Path, other: Path) -> str | None:
    """What differs first: files, users, sequences with their index, vocabulary, or sizes of row groups; None: nothing.

    The order of users in a file does not matter. Bytes differ in any case: two libraries wrote them.
    """
    names = sorted(_files(one) | _files(other))
    for name in names:
        if missing := [str(path) for path in (one, other) if not (path / name).is_file()]:
            return f"{missing[0]} has no {name}"
    for name in names:
        if _row_groups(one / name) != _row_groups(other / name):
            return f"{name}: {_row_groups(one / name)} and {_row_groups(other / name)} rows in its row groups"
    for name in names:
        if name.startswith(_folder(SHARD)):
            left, right = _users(one, name), _users(other, name)
            if not left.equals(right):
                return f"{name}: {_which(left, right)}"
    left, right = (pl.read_parquet(path / VOCABULARY, columns=list(COLUMNS)) for path in (one, other))
    return None if left.equals(right) else f"{VOCABULARY}: {_which(left, right)}"


def _folder(pattern: str) -> str:
    return pattern.partition("/")[0] + "/"


def _files(path: Path) -> set[str]:
    return {str(file.relative_to(path)) for file in path.rglob("*.parquet")}


def _row_groups(path: Path) -> list[int]:
    metadata = pq.read_metadata(path)
    return [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]


def _users(path: Path, name: str) -> pl.DataFrame:
    """A shard's users with their index, by id."""
    index = name.replace(_folder(SHARD), _folder(INDEX), 1)
    both = pl.concat([pl.read_parquet(path / name), pl.read_parquet(path / index)], how="horizontal")
    return both.select(sorted(both.columns)).sort("user_id")


def _which(left: pl.DataFrame, right: pl.DataFrame) -> str:
    if left.schema != right.schema:
        return f"columns {dict(left.schema)} and {dict(right.schema)}"
    if left.height != right.height:
        return f"{left.height} and {right.height} rows"
    differs = [not left[row].equals(right[row]) for row in range(left.height)]
    row = differs.index(True)
    return f"row {row}: {left.row(row)} and {right.row(row)}"
