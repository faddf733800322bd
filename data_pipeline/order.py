"""All rows of one shard, by user and time, without duplicates. Users come in their final, keyed random order.

Legend: N rows, U users and K different items of the shard.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa

from data_pipeline.config import PrepareConfig
from data_pipeline.hashing import hash64
from data_pipeline.narrow import narrow, widen

Ints = npt.NDArray[np.int64]
DENSE_SPAN = 4  # times as many ids as rows that a table of them may have


@dataclass(frozen=True)
class Ordered:
    """item [N]: int32, its place in `items`; columns [N]: timestamp, [weight], narrowed; one user after the other.

    users [U]: user_id and rows int64 of each; items [K]: item_id, rising, and count int64; duplicates: rows dropped.
    """

    item: npt.NDArray[np.int32]
    columns: pa.Table
    users: pa.Table
    items: pa.Table
    duplicates: int


def order(slices: list[pa.Table], config: PrepareConfig) -> Ordered:
    """Orders the rows of a shard by (user, time, place in the source); narrowed `slices` have them in that order.

    Users are ordered by a hash of their id keyed by `config.seed`, so that a file's users lie in no order that means
    anything. Without a time column, timestamps become places in the history, from 0.
    """
    table = pa.concat_tables([widen(part) for part in slices])
    users, user = _users(table["user_id"].combine_chunks(), config.seed)
    item_ids, item = _distinct(table["item_id"].combine_chunks())
    rows = pl.DataFrame(table.drop_columns(["user_id", "item_id"])).with_columns(pl.Series("item", item))
    rows = rows[by_user_and_time(user, rows["timestamp"].to_numpy())]
    lengths = np.bincount(user, minlength=users.height)
    kept = _kept(rows.with_columns(user=np.repeat(np.arange(users.height), lengths)), config)
    duplicates = 0
    if kept is not None:
        duplicates = rows.height - int(kept.sum())
        starts = np.cumsum(lengths) - lengths
        lengths = np.add.reduceat(kept.astype(np.int64), starts) if len(starts) else lengths
        rows = rows.filter(kept)
    if config.time_column is None:
        rows = rows.with_columns(timestamp=np.arange(rows.height) - np.repeat(np.cumsum(lengths) - lengths, lengths))
    counts = np.bincount(rows["item"].to_numpy(), minlength=len(item_ids))
    return Ordered(
        item=rows["item"].to_numpy(),
        columns=narrow(_arrow(rows.drop("item"))),
        users=_arrow(users.with_columns(rows=lengths)),
        items=pa.table({"item_id": item_ids, "count": counts}),
        duplicates=duplicates,
    )


def by_key(ids: pa.Array, seed: int) -> tuple[pl.DataFrame, Ints]:
    """Different user `ids` (user_id) in the order of all files, and the place of each in it."""
    found = pl.DataFrame({"user_id": pl.from_arrow(ids), "key": hash64(ids, seed + 1)}).with_row_index("code")
    found = found.sort("key", "user_id")
    place = np.empty(len(ids), np.int64)
    place[found["code"].to_numpy()] = np.arange(len(ids))
    return found.select("user_id"), place


def _users(column: pa.Array, seed: int) -> tuple[pl.DataFrame, Ints]:
    """The different users in their final order [U], and each row's place among them [N]."""
    ids, code = _distinct(column)
    users, place = by_key(ids, seed)
    return users, place[code]


def _distinct(column: pa.Array) -> tuple[pa.Array, npt.NDArray[np.int32]]:
    """The different ids, rising, and each row's place among them [N]."""
    if pa.types.is_int64(column.type) and len(column):
        ids = column.to_numpy()
        least, span = int(ids.min()), int(ids.max()) - int(ids.min()) + 1
        if span <= DENSE_SPAN * len(ids):  # ids lie close together: a table is several times as fast as hashing
            offset = ids - least
            there = np.bincount(offset, minlength=span) > 0
            place = (np.cumsum(there) - 1).astype(np.int32)
            return pa.array(np.flatnonzero(there) + least), place[offset]
    encoded = column.dictionary_encode()
    ranks = pl.Series(pl.from_arrow(encoded.dictionary)).arg_sort().to_numpy()
    place = np.empty(len(ranks), np.int32)
    place[ranks] = np.arange(len(ranks), dtype=np.int32)
    return encoded.dictionary.take(pa.array(ranks)), place[encoded.indices.to_numpy()]


def by_user_and_time(user: Ints, time: Ints) -> Ints:
    """Indices that sort stably by (user, time).

    Where user, time and row number fit into 64 bits together, sorting these numbers is many times as fast as a sort by
    two keys, and stable by construction.
    """
    if not len(user):
        return user
    first = int(time.min())
    bits = [int(last).bit_length() for last in (user.max(), int(time.max()) - first, len(user) - 1)]
    if sum(bits) > 64:
        return np.lexsort((time, user))
    packed = (user.astype(np.uint64) << np.uint64(bits[1])) | (time - first).astype(np.uint64)
    packed = (packed << np.uint64(bits[2])) | np.arange(len(user), dtype=np.uint64)
    packed.sort()
    return (packed & np.uint64((1 << bits[2]) - 1)).astype(np.int64)


def _kept(rows: pl.DataFrame, config: PrepareConfig) -> npt.NDArray[np.bool_] | None:
    """Which ordered `rows` are no duplicates, the first of equals stays; None where all do."""
    if config.duplicates == "exact":
        return rows.select(pl.struct("user", "item", "timestamp").is_first_distinct()).to_series().to_numpy()
    if config.duplicates == "consecutive":
        again = [pl.col(name).eq_missing(pl.col(name).shift()) for name in ("user", "item")]
        return rows.select(~pl.all_horizontal(again)).to_series().to_numpy()
    return None


def _arrow(frame: pl.DataFrame) -> pa.Table:
    return frame.to_arrow(compat_level=pl.CompatLevel.oldest())
