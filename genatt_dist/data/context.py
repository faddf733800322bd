"""What is known of each event from the times of it and of the events before it, as a row of a table. Without torch.

Nothing here sees a target: position i knows the time of input i and of earlier inputs, so that training and prediction
know the same. When the next event will be is not known at prediction, and is no input.

Legend: N positions, history after history.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import polars as pl

from data_pipeline.errors import GenattError
from genatt_dist.data.arrays import Ints

# Seconds as (factor, divisor); "row" and "none" are no times.
_UNITS = {"day": (86_400, 1), "s": (1, 1), "ms": (1, 10**3), "us": (1, 10**6), "ns": (1, 10**9)}
_MONDAY = 72  # hours from a Monday's midnight to that of 1970-01-01, a Thursday
_LONGEST = 32  # gaps of 2^31 seconds (68 years) and more are alike


def seconds(times: Ints, unit: str | None, where: str) -> Ints:
    """Times in the manifest's unit as whole seconds since 1970. Raises GenattError when they are no times."""
    check_unit(unit, where)
    factor, divisor = _UNITS[str(unit)]
    return times.astype(np.int64) * factor // divisor


def seconds_of_column(times: pl.Series, unit: str | None, where: str) -> Ints:
    """Whole seconds since 1970 of a column of requests: numbers in the manifest's unit, dates, or ISO text (UTC)."""
    if times.dtype == pl.String:
        times = times.str.to_datetime(time_unit="us", time_zone="UTC", strict=False)
    if times.dtype.is_temporal() and times.dtype != pl.Time:
        times, unit = times.cast(pl.Datetime("us")).cast(pl.Int64), "us"
    if times.null_count() or not times.dtype.is_numeric():
        raise GenattError(
            f"{where}: its times cannot be read, which features of type context need: give each row a number in the "
            "data's unit, or a date; or leave the column out"
        )
    return seconds(times.cast(pl.Int64).to_numpy(), unit, where)


def check_unit(unit: str | None, where: str) -> None:
    """Raise GenattError when a data set's time unit tells no time."""
    if unit not in _UNITS:
        raise GenattError(
            f"{where} has no times (time unit {unit or 'not known'}): prepare it with a time_column and its time_unit, "
            "or leave features of type context out"
        )


def hour_of_week(seconds_N: Ints, first_N: Ints) -> Ints:
    """1 + the hour since Monday 00:00 UTC: [N] in 1..168."""
    return (seconds_N // 3600 + _MONDAY) % 168 + 1


def gap(seconds_N: Ints, first_N: Ints) -> Ints:
    """Seconds since the input before: 1 for a history's first one, 2 for none, else 2 + the number of their binary
    digits, up to 34: [N].

    The first input of a window counts as the first, wherever the window lies in the user's history: the model sees no
    earlier one.
    """
    since_N = np.diff(seconds_N, prepend=seconds_N[:1])
    digits_N = np.frexp(np.maximum(since_N, 0).astype(np.float64))[1]
    row_N = 2 + np.minimum(digits_N, _LONGEST).astype(np.int64)
    row_N[first_N] = 1
    return row_N


# By column: the rows (seconds [N], index of each history's first position) → [N], and how many there are. Row 0 is that
# of an unknown time.
CONTEXTS: dict[str, tuple[Callable[[Ints, Ints], Ints], int]] = {
    "hour_of_week": (hour_of_week, 169),
    "gap": (gap, _LONGEST + 3),
}
