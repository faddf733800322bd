"""Columns of raw rows cast to what the pipeline works on; what does not fit is refused by name, count and first row."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass

import polars as pl

from data_pipeline.errors import GenattError
from data_pipeline.readers.times import FACTORS, seen_units

SHOWN = 80  # characters of a value in a message


def missing_column(name: str, option: str, label: str, there: Sequence[str]) -> GenattError:
    """The error for a column that `label` has not: lists those it has and suggests the nearest."""
    near = difflib.get_close_matches(name, there, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return GenattError(f"no column {name!r} in {label}: {hint}it has {', '.join(there)}: set {option}")


def refuse_twice(columns: Sequence[str], there: Sequence[str], label: str) -> None:
    """Raises `GenattError` if one of `columns` is more than once among those that `label` has."""
    for name in columns:
        if (times := there.count(name)) > 1:
            raise GenattError(f"{label} has {times} columns {name!r}: rename all but one")


def shortened(text: str) -> str:
    """`text` for a message: a field may be megabytes long."""
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"


def mixed_units(name: str, one: tuple[str, str], other: tuple[str, str]) -> GenattError:
    """The error for a numeric time column in two units, each with a place that tells it."""
    return GenattError(
        f"column {name!r} has times in {one[0]} in {one[1]}, but in {other[0]} in {other[1]}: write all in one unit, "
        "or set time_unit if they are"
    )


@dataclass(frozen=True)
class Checker:
    """Casts the columns of some rows of one file; `label` and `first_row` say where they are."""

    label: str
    first_row: int

    def ids(self, column: pl.Series, kind: str) -> pl.Series:
        """As Int64 or String (`kind`), without nulls. Negative integers are ids like others."""
        if column.null_count():
            self.refuse(column.is_null(), column, "nulls", "remove or fill those rows")
        if kind == "string":
            return column.cast(pl.String)
        numbers = column.cast(pl.Int64, strict=False)
        lossy = numbers.is_null()
        if column.dtype == pl.String:  # `007` would become 7, `+7` too
            lossy |= column.str.starts_with("+") | column.str.starts_with("-0")
            lossy |= column.str.starts_with("0") & (column.str.len_bytes() > 1)
        self.refuse(lossy, column, "values that are no 64-bit integer", "set id_type=string")
        return numbers

    def events(self, column: pl.Series) -> pl.Series:
        """As String; a null stays one: a row of no event type."""
        return column.cast(pl.String)

    def times(self, column: pl.Series, kind: str, unit: str) -> pl.Series:
        """As Int64 in `unit`, without nulls."""
        if column.null_count() or column.dtype.is_float():
            missing = column.is_null() | column.is_nan() if column.dtype.is_float() else column.is_null()
            self.refuse(missing, column, "nulls or NaN", "remove or fill those rows")
        if kind == "date":
            return column.to_physical().cast(pl.Int64)
        if kind == "datetime":
            moments = to_datetime(column) if column.dtype == pl.String else column
            self.refuse(
                moments.is_null(), column, "values that are no date and time", "write them all alike, as ISO 8601"
            )
            return self._in_unit(moments, unit)
        if column.dtype.is_integer() and column.dtype != pl.UInt64:
            return column.cast(pl.Int64)
        if column.dtype == pl.String:
            # Straight to integers where that works: nanoseconds do not fit into a float.
            integers = column.cast(pl.Int64, strict=False)
            whole = integers if not integers.null_count() else integers.fill_null(_whole(_floats(column)))
        else:
            whole = _whole(column)
        self.refuse(whole.is_null(), column, "values that are no whole number", "round them or use a finer unit")
        return whole

    def _in_unit(self, moments: pl.Series, unit: str) -> pl.Series:
        physical = moments.to_physical()
        factor = FACTORS[unit] // FACTORS[moments.dtype.time_unit]  # type: ignore[attr-defined]
        if factor == 1:
            return physical
        far = physical.abs() > (1 << 63) // factor - 1  # a file in a finer unit cannot hold them
        self.refuse(far, moments, f"times too far off for {unit}", "write the time column of all files in one unit")
        return physical * factor

    def one_unit(self, times: pl.Series, name: str, told: tuple[str, str]) -> tuple[str, str]:
        """Refuses numeric `times` that tell another unit than `told` (a unit, a place that tells it); returns both."""
        for unit, (row, value) in seen_units(times).items():
            where = f"{self.label} ({value} at row {self.first_row + row})"
            if told[0] in FACTORS and unit != told[0]:
                raise mixed_units(name, (unit, where), told)
            told = told if told[0] in FACTORS else (unit, where)
        return told

    def refuse(self, bad: pl.Series, column: pl.Series, what: str, mend: str) -> None:
        """Raises `GenattError` if any row is `bad`."""
        if count := int(bad.sum()):
            row = int(bad.arg_max() or 0)
            rows = f"rows {self.first_row} to {self.first_row + len(column) - 1}"
            raise GenattError(
                f"column {column.name!r} of {self.label} has {count} {what} in {rows} (counted from 0), "
                f"first {shortened(repr(column[row]))} at row {self.first_row + row}: {mend}"
            )


def to_datetime(values: pl.Series) -> pl.Series:
    """ISO 8601 text as datetimes in UTC, null where it is none: what begins with a day or month could be either."""
    iso = values.str.contains(r"^\d{4}[-/]")
    return values.set(~iso, None).str.to_datetime(time_unit="us", time_zone="UTC", strict=False)


def _floats(text: pl.Series) -> pl.Series:
    return text.cast(pl.Float64, strict=False)


def _whole(numbers: pl.Series) -> pl.Series:
    """As Int64, null where `numbers` has a fraction or does not fit."""
    rounded = numbers.cast(pl.Int64, strict=False)
    return pl.select(pl.when(rounded == numbers).then(rounded)).to_series()
