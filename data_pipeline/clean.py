"""Rows that do not count are taken out: outside the time range, or of an event type without weight."""

import polars as pl

from data_pipeline.config import PrepareConfig
from data_pipeline.readers import Plan

Dropped = dict[str, int]  # rows dropped, by reason


def clean(rows: pl.DataFrame, plan: Plan, config: PrepareConfig) -> tuple[pl.DataFrame, Dropped]:
    """`rows` of a reader without those; with `weight` float32 in place of `event` where events have weights.

    A row that fails for both reasons counts as outside the time range.
    """
    dropped = {}
    inside = pl.lit(True)
    if plan.time_from is not None:
        inside &= pl.col("timestamp") >= plan.time_from
    if plan.time_to is not None:
        inside &= pl.col("timestamp") < plan.time_to
    if plan.time_from is not None or plan.time_to is not None:
        kept = rows.filter(inside)
        dropped["outside_time_range"] = rows.height - kept.height
        rows = kept
    if config.event_weights is not None:
        weight = pl.col("event").replace_strict(config.event_weights, default=0.0, return_dtype=pl.Float32)
        kept = rows.with_columns(weight=weight).drop("event").filter(pl.col("weight") > 0)
        dropped["event_without_weight"] = rows.height - kept.height
        rows = kept
    return rows, dropped
