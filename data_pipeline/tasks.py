"""What runs in Ray's workers, in the order of the stages. Each function is one stage for one block or one shard.

read_block    Ray Data: the number of some chunks → their rows, cleaned, each with the number of its shard
split         blocks → one slice for every shard
order         slices of a shard → its rows by user and time
encode        items of a shard → their codes
bury          rows of a shard → which users a round of the k-core leaves
write         rows of a shard → a Parquet file of sequences, its index, and what describes them

A task that returns something large returns something small before it, which says what was done.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

from data_pipeline import append, partition, sequences, vocabulary
from data_pipeline import order as ordering
from data_pipeline.append import OldShard
from data_pipeline.clean import Dropped, clean
from data_pipeline.config import PrepareConfig
from data_pipeline.format import INDEX, SHARD, ShardFile, WrittenFile, parquet_bytes
from data_pipeline.k_core import Codes, Flags, Removed, bury_users, rows_of_users
from data_pipeline.narrow import widen
from data_pipeline.readers import Plan, read_chunk
from data_pipeline.sequences import Sequences
from data_pipeline.splits import NONE
from data_pipeline.storage import write_bytes
from data_pipeline.vocabulary import Tally


def read_block(batch: pa.Table, plan: Plan, config: PrepareConfig, num_shards: int) -> Iterator[pa.Table]:
    """Reads the chunks of the task whose number is in `batch["task"]`."""
    for number in plan.tasks[batch["task"][0].as_py()]:
        for rows in read_chunk(plan, plan.chunks[number], config):
            yield partition.tag(*clean(rows.drop("position"), plan, config), num_shards)


def split(num_shards: int, *blocks: pa.Table) -> tuple[Any, ...]:
    """Counts, then the rows of each shard."""
    counted, slices = partition.split(list(blocks), num_shards)
    return counted, *slices


@dataclass(frozen=True)
class Told:
    """What `order` says of a shard: rows it kept, duplicates it dropped."""

    rows: int
    duplicates: int


def order(config: PrepareConfig, *slices: pa.Table) -> tuple[Told, Codes, pa.Table, pa.Table, pa.Table]:
    """Items and other columns of all rows, users and items of a shard; see `order.Ordered`."""
    ordered = ordering.order(list(slices), config)
    told = Told(len(ordered.item), ordered.duplicates)
    return told, ordered.item, ordered.columns, ordered.users, ordered.items


def encode(items: pa.Table, catalogue: pa.Table) -> Codes:
    """Codes of the items of a shard: int32 [K]."""
    return vocabulary.encode(_column(items), _column(catalogue))


def _column(items: pa.Table) -> pl.Series:
    return pl.Series(pl.from_arrow(items["item_id"]))


def known_users(users: pa.Table, old: OldShard) -> Flags:
    """Which users of a shard the parent knows; where there are none, nothing is read."""
    return old.has(users["user_id"].combine_chunks()) if users.num_rows else np.empty(0, np.bool_)


def bury(
    item: Codes,
    users: pa.Table,
    codes: Codes,
    alive: Flags | None,
    lives: Flags,
    min_user: int,
    exempt: Flags | None,
) -> tuple[Removed, Flags]:
    """A round of the k-core in a shard. item: each row's place in `codes`; alive: users, None for all; lives: items."""
    alive = np.ones(users.num_rows, np.bool_) if alive is None else alive
    left, removed = bury_users(item, users["rows"].to_numpy(), alive, lives[codes], min_user, exempt)
    return replace(removed, codes=codes[removed.codes]), left


@dataclass(frozen=True)
class Written:
    """What became of a shard.

    file: None if no user is there. dropped: rows by reason. train: dense ids and how much more often each trains than
    in the parent's shard, if there is one; trained: how many more rows train, by the index. again, lost: duplicates of
    the two versions, new rows by their items' codes, old ones by dense id. targets: users with a valid and with a test
    target, None where a copied index was not looked into. rejected: users of the new rows, unknown to the parent, of
    whom no row is left.
    """

    file: ShardFile | None
    dropped: Dropped
    train: Tally = field(default_factory=Tally.empty)
    trained: int = 0
    again: Tally = field(default_factory=Tally.empty)
    lost: Tally = field(default_factory=Tally.empty)
    targets: tuple[int, int] | None = (0, 0)
    rejected: int = 0


def write(
    shard: int,
    item: Codes,
    columns: pa.Table,
    users: pa.Table,
    codes: Codes,
    alive: Flags,
    dense_of_code: Codes,
    lives: Flags,
    directory: str,
    config: PrepareConfig,
    out_of_vocabulary: int | None,
    old: OldShard | None,
    known: Flags | None = None,
) -> Written:
    """Writes one shard. alive: users; lives: items of the core by code [I]; rows of others are not written.

    old: the parent's shard, copied if it gets no rows. known: which users are in it.
    """
    lengths, columns = users["rows"].to_numpy(), widen(columns)
    everything = Sequences(
        users["user_id"].combine_chunks(),
        lengths,
        dense_of_code[codes][item],
        columns["timestamp"].to_numpy(),
        columns["weight"].to_numpy() if "weight" in columns.column_names else None,
    )
    core = np.repeat(alive, lengths) & lives[codes][item]
    admitted = core & (everything.items > 0)
    kept = everything.where(admitted)
    without = rows_of_users(admitted, lengths) == 0
    rejected = int((without if known is None else without & ~known).sum())
    dropped = {"below_min_count": int(core.sum()) - len(kept.items)}
    if old is not None:
        if not len(kept.items):
            return Written(old.copied(directory), dropped, targets=None, rejected=rejected)
        before, places_before = old.read()
        kept, again, lost = append.merged(append.sequences_of(before), kept, config)
        dropped["duplicate_of_parent"] = int(again.sum()) + len(lost)
    newest = kept.newest(config.max_history)
    dropped["beyond_max_history"] = len(kept.items) - len(newest.items)
    table = newest.table()
    if not table.num_rows:
        return Written(None, dropped, rejected=rejected)
    places = sequences.index(table, config.split, out_of_vocabulary)
    file = ShardFile(
        shard=shard,
        users=table.num_rows,
        interactions=len(newest.items),
        index=_write(directory, INDEX.format(shard), places, config.row_group_size),
        **_write(directory, SHARD.format(shard), table, config.row_group_size).model_dump(),
    )
    train, trained = Tally(*sequences.train_counts(table, places)), _trained(places)
    valid, test = (int((places[name].to_numpy() != NONE).sum()) for name in ("valid", "test"))
    written = Written(file, dropped, train, trained, targets=(valid, test), rejected=rejected)
    if old is None:
        return written
    items, counts = sequences.train_counts(before, places_before)
    return replace(
        written,
        train=Tally(np.concatenate([train.ids, items]), np.concatenate([train.counts, -counts])),
        trained=trained - _trained(places_before),
        again=Tally.of(codes[item[admitted][again]]),
        lost=Tally.of(lost),
    )


def _trained(places: pa.Table) -> int:
    return int(places["train"].to_numpy().sum(dtype=np.int64))


def _write(directory: str, path: str, table: pa.Table, row_group_size: int) -> WrittenFile:
    content = parquet_bytes(table, row_group_size)
    write_bytes(f"{directory}/{path}", content)
    return WrittenFile(path=path, bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
