"""Units of time: which one numbers are in, and a bound given as a date in the unit of a column.

Numeric times of the years 1973 to 2100 tell their unit: seconds have 9 or 10 digits, milliseconds 12 or 13, and so on.
Smaller numbers (places 0, 1, 2, …) tell none. Datetimes without a time zone are taken as UTC.
"""

import datetime

import polars as pl

from data_pipeline.errors import GenattError

FACTORS = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}  # in a second
UNITS = ("none", "row", "day", *FACTORS)  # "none": numbers without a unit; "row": no time column
DAY = 86_400
EARLIEST, LATEST = 100_000_000, 4_102_444_800  # 1973-03-03 and 2100-01-01, in seconds
EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)

Seen = dict[str, tuple[int, int]]  # unit -> a row and the number there that tells it


def unit_of(number: float) -> str:
    """The unit that the size of `number` tells, or "none"."""
    return next((unit for unit, f in FACTORS.items() if EARLIEST * f <= number < LATEST * f), "none")


def seen_units(times: pl.Series) -> Seen:
    """The units that numeric `times` tell, each with the first row that tells it. Nearly free where there is one."""
    low, high = times.min(), times.max()
    if low is None or high is None:
        return {}
    possible = [unit for unit, f in FACTORS.items() if low < LATEST * f and high >= EARLIEST * f]  # type: ignore[operator]
    if len(possible) == 1 and unit_of(low) == unit_of(times[0]) == possible[0]:  # type: ignore[arg-type]
        return {possible[0]: (0, times[0])}
    return _first_of(times, possible)


def _first_of(times: pl.Series, units: list[str]) -> Seen:
    seen: Seen = {}
    for unit in units:
        inside = times.is_between(EARLIEST * FACTORS[unit], LATEST * FACTORS[unit], closed="left")
        row = inside.arg_max()
        if row is not None and inside[row]:
            seen[unit] = (row, times[row])
    return seen


def in_unit(value: int | str, unit: str, option: str) -> int:
    """`value` as a number that times in `unit` compare with: t >= result exactly where t is at or after `value`.

    Parameters
    ----------
    value
        A number, taken as it is, or an ISO date or datetime.
    unit
        One of `UNITS`.
    option
        What the user knows `value` by, for messages.

    Raises
    ------
    GenattError
        Neither a number nor a date, or a date where times have no unit.
    """
    if isinstance(value, int) or value.strip().lstrip("-").isdigit():
        return int(value)
    try:
        moment = datetime.datetime.fromisoformat(value.strip())
    except ValueError:
        raise GenattError(f"{option}={value!r} is no date: write it like 2024-01-31 or 2024-01-31T12:00:00Z") from None
    if unit not in (*FACTORS, "day"):
        raise GenattError(
            f"{option}={value!r} is a date, but the times of the source are numbers that tell no unit: give "
            f"{option} as a number like them, or set time_unit"
        )
    since = (moment if moment.tzinfo else moment.replace(tzinfo=datetime.UTC)) - EPOCH
    microseconds = (since.days * DAY + since.seconds) * 10**6 + since.microseconds
    if unit == "day":
        return -(-microseconds // (DAY * 10**6))
    return -(-microseconds * FACTORS[unit] // 10**6)
