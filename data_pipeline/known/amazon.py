"""Reads the Amazon 5-core reviews of 2014: reviews as JSON lines, metadata as lines that are Python literals."""

import ast
import gzip
from pathlib import Path
from typing import Any

import polars as pl

REVIEW = {"reviewerID": pl.String, "asin": pl.String, "overall": pl.Float64, "unixReviewTime": pl.Int64}
ITEM = pl.Schema([("item_id", pl.String()), ("title", pl.String()), ("categories", pl.List(pl.String()))])
BLOCK = 1 << 24  # bytes of metadata lines held at once


def read(paths: list[Path | None], directory: Path) -> None:
    """Writes the log, and where there is metadata its items: item_id, title, categories list<string>."""
    reviews, metadata = paths
    if reviews is None:
        raise ValueError("the reviews are not optional")
    log = pl.scan_ndjson(reviews, schema=REVIEW)
    log = log.rename({"reviewerID": "user_id", "asin": "item_id", "overall": "rating", "unixReviewTime": "timestamp"})
    log.sink_parquet(directory / "interactions.parquet")
    if metadata is not None:
        known = pl.scan_parquet(directory / "interactions.parquet").select(pl.col("item_id").unique()).collect()
        _items(metadata, known).write_parquet(directory / "items.parquet")


def _items(metadata: Path, known: pl.DataFrame) -> pl.DataFrame:
    """The items of `known`, in their order in `metadata`.

    Only their lines, a few percent of the file, are parsed: by `ast`, which runs nothing, for they are no JSON.
    """
    found: list[dict[str, Any]] = []
    asin = pl.col("line").str.extract("'asin': '([^']+)'").alias("item_id")
    with gzip.open(metadata) as file:
        while block := file.readlines(BLOCK):
            lines = pl.DataFrame({"line": pl.Series(block, dtype=pl.Binary).cast(pl.String)})
            wanted = lines.with_columns(asin).join(known, on="item_id", how="semi", maintain_order="left")["line"]
            found += [_attributes(ast.literal_eval(line)) for line in wanted]
    return pl.DataFrame(found, schema=ITEM).unique("item_id", keep="first", maintain_order=True)


def _attributes(item: dict[str, Any]) -> dict[str, Any]:
    names = dict.fromkeys(name for path in item.get("categories", []) for name in path)
    return {"item_id": item["asin"], "title": item.get("title"), "categories": list(names)}
