"""Values of the items' attributes as rows of a table: which ones each item has. Without torch.

Legend: V items, K values of all items.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl
import pyarrow as pa

from data_pipeline import format as shards
from data_pipeline.errors import GenattError
from data_pipeline.hashing import hash64
from data_pipeline.storage import redact
from genatt_dist.data.arrays import Ints, Items
from genatt_dist.embedding.feature_options import AttributeFeature

_VOCABULARY = {"item_id", "dense_id", "count", "train_count"}
_HASH_KEY = 2  # the vocabulary's buckets of items have key 1


@dataclass(frozen=True)
class ItemValues:
    """Item i has the rows row_K[first[i] : first[i + 1]], each once, in the order of its list; maybe none.

    first: int64 [V + 2], so that 0 is padding, which has none. row_K: int32, 1 … num_rows − 1: row 0 is no value's.
    """

    first: Ints
    row_K: Items
    num_rows: int

    def of(self, items: Items) -> tuple[Ints, Ints]:
        """(rows, first): those of `items`, one item after the other; item i's begin at first[i]."""
        start = self.first[items]
        count = self.first[items.astype(np.int64) + 1] - start
        end = np.cumsum(count)
        first = end - count
        index = np.arange(end[-1] if len(end) else 0) + np.repeat(start - first, count)
        return self.row_K.take(index).astype(np.int64), first


def read_values(path: str, manifest: shards.Manifest, features: Sequence[AttributeFeature]) -> dict[str, ItemValues]:
    """The values of each feature by name, from the vocabulary of the data set at `path`.

    Raises GenattError: no such column, or one that holds neither text nor whole numbers.
    """
    values: dict[str, ItemValues] = {}
    for feature in features:
        try:
            column = shards.read_vocabulary(path, manifest, [feature.column])[feature.column]
        except GenattError:  # not there, or damaged
            _check_column(path, manifest, feature)
            raise
        values[feature.name] = values_of(column, feature)
    return values


def _check_column(path: str, manifest: shards.Manifest, feature: AttributeFeature) -> None:
    columns = shards.read_vocabulary(path, manifest).column_names
    known = [name for name in columns if name not in _VOCABULARY]
    if feature.column not in known:
        raise GenattError(
            f"features.{feature.name}: {redact(path)} has no item attribute {feature.column!r}: "
            + (f"name one of {', '.join(known)}" if known else "it has none; prepare it with --items FILE")
        )


def values_of(column: pa.ChunkedArray, feature: AttributeFeature) -> ItemValues:
    """`column` holds a value or a list of values for the items 1..V; null is no value.

    Without buckets a value's row is its place among all values in the order in which items have them, from 1 on: items
    come by falling count, so frequent values come first, and a data set that descends from this one keeps the rows of
    all its values and adds new ones after them, as long as the attributes of its items stay.
    """
    kind = column.type
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        kind = kind.value_type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_integer(kind)):
        raise GenattError(
            f"features.{feature.name}: column {feature.column!r} of the vocabulary holds {column.type}, not text or "
            "whole numbers, nor lists of them: prepare the data with such a column"
        )
    series = pl.Series("value", column)
    if not isinstance(series.dtype, pl.List | pl.Array):
        series = series.to_frame().select(pl.concat_list("value"))["value"]
    lists = pl.DataFrame({"value": series.cast(pl.List(pl.Int64 if pa.types.is_integer(kind) else pl.String))})
    lists = lists.select(
        item=pl.int_range(1, pl.len() + 1), value=pl.col("value").list.drop_nulls().list.unique(maintain_order=True)
    )
    if feature.max_values is not None:
        lists = lists.with_columns(pl.col("value").list.head(feature.max_values))
    listed = lists.explode("value").drop_nulls("value")
    if not listed.height:
        raise GenattError(
            f"features.{feature.name}: no item has a value in column {feature.column!r} of the vocabulary: leave the "
            "feature out, or prepare the data with such values"
        )
    if feature.buckets is None:
        words = listed.select(pl.col("value").unique(maintain_order=True)).with_row_index("row", offset=1)
        rows = listed.join(words, on="value", how="left", maintain_order="left")["row"].to_numpy()
        num_rows = words.height + 1
    else:
        hashes = hash64(listed["value"].to_arrow(compat_level=pl.CompatLevel.oldest()), key=_HASH_KEY)
        rows, num_rows = hashes % np.uint64(feature.buckets) + np.uint64(1), feature.buckets + 1
    count = np.bincount(listed["item"].to_numpy(), minlength=lists.height + 1)
    first = np.concatenate(([0], np.cumsum(count, dtype=np.int64)))
    return ItemValues(first, rows.astype(np.int32), num_rows)
