"""Item ids 1..V by falling frequency, with counts and the attributes of an items file."""

import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from data_pipeline.errors import GenattError
from data_pipeline.readers import missing_column

COLUMNS = ("item_id", "dense_id", "count", "train_count")


def build(item_ids: pl.Series) -> pl.DataFrame:
    """Vocabulary of the items in `item_ids` (one a row of the log): item_id, dense_id int32, count int64.

    Ordered by count, falling, then by original id; dense ids follow that order and start at 1, for 0 is padding.
    """
    counts = item_ids.alias("item_id").to_frame().group_by("item_id").len("count")
    ranked = counts.sort("count", "item_id", descending=[True, False])
    dense_id = pl.int_range(1, pl.len() + 1, dtype=pl.Int32)
    return ranked.select("item_id", dense_id.alias("dense_id"), pl.col("count").cast(pl.Int64))


def finish(vocabulary: pl.DataFrame, train_counts: pl.DataFrame) -> pa.Table:
    """`vocabulary` with train_count int64: sums of `train_counts` (dense_id, train_count), 0 where there is none."""
    summed = train_counts.group_by("dense_id").agg(pl.col("train_count").sum())
    joined = vocabulary.join(summed, on="dense_id", how="left", maintain_order="left")
    table = joined.with_columns(pl.col("train_count").fill_null(0)).select(COLUMNS)
    return _narrow(table.to_arrow(compat_level=pl.CompatLevel.oldest()))


def join_attributes(vocabulary: pa.Table, attributes: pa.Table, item_column: str, label: str) -> pa.Table:
    """`vocabulary` with the other columns of `attributes`, in their own types; null for items `label` does not list.

    Raises
    ------
    GenattError
        No item column, ids of another type, an item listed twice, or a column whose name the vocabulary needs.
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
        vocabulary = vocabulary.append_column(name, column)
    return vocabulary


def _narrow(table: pa.Table) -> pa.Table:
    """`large_string` ids as plain strings, the type of every reader."""
    index = table.schema.get_field_index("item_id")
    if pa.types.is_large_string(table.schema.field(index).type):
        return table.set_column(index, "item_id", table["item_id"].cast(pa.string()))
    return table
