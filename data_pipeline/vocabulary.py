"""Item ids: provisional codes while items are counted, dense ids 1..V after that, and the table of both ids.

Legend: I items seen, by code; V dense ids.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from data_pipeline.config import PrepareConfig
from data_pipeline.errors import GenattError
from data_pipeline.hashing import hash64
from data_pipeline.readers import missing_column

COLUMNS = ("item_id", "dense_id", "count", "train_count")
Ints = npt.NDArray[np.int64]


class Tally(NamedTuple):
    """Codes or dense ids [K], and rows of each int64 [K]."""

    ids: npt.NDArray[np.signedinteger]
    counts: Ints

    @staticmethod
    def of(rows: npt.NDArray[np.signedinteger]) -> "Tally":
        """How often each id is in `rows`."""
        return Tally(*np.unique(rows, return_counts=True))

    @staticmethod
    def empty() -> "Tally":
        """Of no rows."""
        return Tally.of(np.empty(0, np.int64))

    @staticmethod
    def joined(parts: "Sequence[Tally]") -> "Tally":
        """All of `parts`, one after the other: an id may come again."""
        return Tally(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


@dataclass(frozen=True)
class Vocabulary:
    """table: item_id, dense_id int32, count int64 by dense id; dense_of_code: int32 [I], 0 where rows are dropped.

    out_of_vocabulary: the dense id shared by rare items (its item_id is null), or None. buckets: with hash buckets,
    item_id, dense_id and count of every item; `table` then names the most frequent item of each bucket.
    """

    table: pl.DataFrame
    dense_of_code: npt.NDArray[np.int32]
    out_of_vocabulary: int | None = None
    buckets: pl.DataFrame | None = None

    @property
    def size(self) -> int:
        """V: the largest dense id."""
        return self.table.height

    def without(self, catalogue: pl.Series, new: Tally, old: Tally) -> "Vocabulary":
        """Counts without duplicates of two versions: `new` rows by code (place in `catalogue`), `old` ones by dense id.

        Which of a bucket's items an old row is of, nobody knows any more: the most frequent ones lose them.
        """
        counts = np.concatenate([[0], self.table["count"].to_numpy()])
        np.subtract.at(counts, self.dense_of_code[new.ids], new.counts)
        np.subtract.at(counts, old.ids, old.counts)
        table = self.table.with_columns(pl.Series("count", counts[1:]))
        if self.buckets is None:
            return replace(self, table=table)
        ours = merge([pl.DataFrame({"item_id": catalogue[new.ids], "count": new.counts})])
        items = self.buckets.join(ours, on="item_id", how="left", suffix="_new", maintain_order="left")
        items = _ordered(items.with_columns(pl.col("count") - pl.col("count_new").fill_null(0)).drop("count_new"))
        theirs = np.zeros(self.size + 1, np.int64)
        np.add.at(theirs, old.ids, old.counts)
        before = pl.col("count").cum_sum().over("dense_id") - pl.col("count")
        left = pl.Series("left", theirs[items["dense_id"].to_numpy()])
        items = _ordered(items.with_columns(pl.col("count") - (left - before).clip(0, pl.col("count"))))
        heads = _heads(items, self.size).with_columns(table["count"])
        return replace(self, table=heads, buckets=_by_bucket(items))


def merge(counts: list[pl.DataFrame]) -> pl.DataFrame:
    """Sums of several tables (item_id, count) by item, in no particular order."""
    return pl.concat(counts).group_by("item_id").agg(pl.col("count").sum())


def encode(item_ids: pl.Series, catalogue: pl.Series) -> npt.NDArray[np.int32]:
    """The code (place in `catalogue`) of each item id; both rise."""
    if item_ids.dtype.is_integer():
        return np.searchsorted(catalogue.to_numpy(), item_ids.to_numpy()).astype(np.int32)
    numbered = catalogue.to_frame("item_id").with_row_index("code")
    coded = item_ids.to_frame("item_id").join(numbered, on="item_id", maintain_order="left", how="left")
    return coded["code"].cast(pl.Int32).to_numpy()


def build(items: pl.Series, counts: Ints, config: PrepareConfig, known: pl.DataFrame | None = None) -> Vocabulary:
    """Vocabulary of `items` [I] with `counts` [I] rows each; an item without rows gets no id.

    Ordered by count, falling, then by original id; dense ids follow that order and start at 1, for 0 is padding. Items
    below `config.min_count` get no id, or share one that follows all others. `known` (item_id, dense_id and count of
    the parent version, item_id null for the shared id) keep their ids, whatever their count, and counts add up; new
    ones follow.
    """
    counted = pl.DataFrame({"item_id": items, "count": counts}).with_row_index("code").filter(pl.col("count") > 0)
    if config.hash_buckets is not None:
        return _hashed(counted, len(items), config.hash_buckets, known)
    if known is None:
        known = pl.DataFrame(schema={"item_id": items.dtype, "dense_id": pl.Int32, "count": pl.Int64})
    old = known.drop_nulls("item_id").join(counted, on="item_id", how="left", suffix="_new")
    old = old.with_columns(pl.col("count") + pl.col("count_new").fill_null(0))
    new = counted.join(known, on="item_id", how="anti")
    rare = new.filter(pl.col("count") < config.min_count)
    own = new.filter(pl.col("count") >= config.min_count).sort("count", "item_id", descending=[True, False])
    own = own.with_columns(dense_id=pl.int_range(1, pl.len() + 1, dtype=pl.Int32) + known.height)
    listed = pl.concat([part.select("item_id", "dense_id", "count", "code") for part in (old, own)])

    dense_of_code = np.zeros(len(items), np.int32)
    coded = listed.drop_nulls("code")
    dense_of_code[coded["code"].to_numpy()] = coded["dense_id"].to_numpy()
    shared = None
    if config.out_of_vocabulary == "bucket":
        before = known.filter(pl.col("item_id").is_null())
        shared = int(before["dense_id"][0]) if before.height else known.height + own.height + 1
        dense_of_code[rare["code"].to_numpy()] = shared
        row = listed.clear(n=1).with_columns(
            dense_id=pl.lit(shared, pl.Int32),
            count=pl.lit(int(before["count"].sum()) + int(rare["count"].sum()), pl.Int64),
        )
        listed = pl.concat([listed, row])
    return Vocabulary(listed.sort("dense_id").drop("code"), dense_of_code, shared)


def _hashed(counted: pl.DataFrame, num_codes: int, buckets: int, known: pl.DataFrame | None) -> Vocabulary:
    """Ids by hash: 1 + hash % `buckets`, the same for an item whenever it comes."""

    def bucket(item_ids: pl.Series) -> npt.NDArray[np.int32]:
        hashes = hash64(item_ids.to_arrow(compat_level=pl.CompatLevel.oldest()), key=1)
        return (hashes % np.uint64(buckets)).astype(np.int32) + 1

    items = merge([part.select("item_id", "count") for part in (counted, known) if part is not None])
    items = items.with_columns(pl.Series("dense_id", bucket(items["item_id"])))
    items = _ordered(items)
    dense_of_code = np.zeros(num_codes, np.int32)
    dense_of_code[counted["code"].to_numpy()] = bucket(counted["item_id"])
    return Vocabulary(_heads(items, buckets), dense_of_code, buckets=_by_bucket(items))


def _ordered(items: pl.DataFrame) -> pl.DataFrame:
    return items.sort("count", "item_id", descending=[True, False])


def _heads(items: pl.DataFrame, buckets: int) -> pl.DataFrame:
    """The first of `items` and the sum of counts of each bucket, from 1 on; null and 0 where it is empty."""
    heads = items.group_by("dense_id", maintain_order=True).agg(pl.col("item_id").first(), pl.col("count").sum())
    every = pl.DataFrame({"dense_id": np.arange(1, buckets + 1, dtype=np.int32)})
    table = every.join(heads, on="dense_id", how="left", maintain_order="left")
    return table.select("item_id", "dense_id", pl.col("count").fill_null(0))


def _by_bucket(items: pl.DataFrame) -> pl.DataFrame:
    return items.sort("dense_id", maintain_order=True).select("item_id", "dense_id", "count")


def finish(vocabulary: pl.DataFrame, train_counts: Ints) -> pa.Table:
    """`vocabulary` with train_count int64; `train_counts` [V + 1] is indexed by dense id."""
    table = vocabulary.with_columns(pl.Series("train_count", train_counts[1:])).select(COLUMNS)
    return _narrow(table.to_arrow(compat_level=pl.CompatLevel.oldest()))


def join_attributes(vocabulary: pa.Table, attributes: pa.Table, item_column: str, label: str) -> pa.Table:
    """`vocabulary` with the other columns of `attributes`, in their own types; null for items `label` does not list.

    Of a column that is there already, values of `attributes` replace those before, nulls do not.

    Raises
    ------
    GenattError
        No item column, ids of another type, an item listed twice, a column whose name the vocabulary needs, or one that
        is there already and has another type.
    """
    if item_column not in attributes.column_names:
        raise missing_column(item_column, "item_column", label, attributes.column_names)
    wanted = vocabulary.schema.field("item_id").type
    try:
        ids = attributes[item_column].combine_chunks().cast(wanted)
    except pa.ArrowInvalid as error:
        raise GenattError(
            f"column {item_column!r} has mixed types: {wanted} in the interactions, "
            f"{attributes[item_column].type} in {label}: write both with one type"
        ) from error
    occurrences = pc.value_counts(ids)
    if len(twice := occurrences.filter(pc.greater(occurrences.field("counts"), 1))):
        raise GenattError(
            f"item {twice[0]['values'].as_py()!r} is listed more than once in {label}: keep one row an item"
        )
    others = attributes.drop_columns([item_column])
    if clash := [name for name in others.column_names if name in COLUMNS]:
        raise GenattError(f"column {clash[0]!r} of {label} has a name the vocabulary needs: rename it")
    rows = pc.index_in(vocabulary["item_id"], value_set=ids)
    for name, column in zip(others.column_names, others.take(rows).columns, strict=True):
        if name not in vocabulary.column_names:
            vocabulary = vocabulary.append_column(name, column)
            continue
        try:
            column = _updated(vocabulary[name], column)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise GenattError(
                f"column {name!r} of {label} has type {column.type}, it had {vocabulary[name].type} before: cast it, "
                "or give it another name"
            ) from error
        vocabulary = vocabulary.set_column(vocabulary.column_names.index(name), name, column)
    return vocabulary


def _updated(old: pa.ChunkedArray, new: pa.ChunkedArray) -> pa.Array:
    """`new` where it is not null, else `old`; of any type, also where no kernel chooses between two arrays."""
    both = pa.chunked_array([*old.chunks, *new.cast(old.type).chunks], old.type).unify_dictionaries().combine_chunks()
    place = np.arange(len(old))
    return both.take(pa.array(np.where(new.is_valid().to_numpy(), place + len(old), place)))


def _narrow(table: pa.Table) -> pa.Table:
    """`large_string` ids as plain strings, the type of every reader."""
    index = table.schema.get_field_index("item_id")
    if pa.types.is_large_string(table.schema.field(index).type):
        return table.set_column(index, "item_id", table["item_id"].cast(pa.string()))
    return table
