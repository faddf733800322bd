"""What one file holds, by its footer or head: which columns there are, what kind each is, which unit its times tell."""

from collections.abc import Sequence
from dataclasses import dataclass

import polars as pl
import pyarrow as pa

from data_pipeline.config import PrepareConfig
from data_pipeline.errors import GenattError
from data_pipeline.readers import parquet, text
from data_pipeline.readers.access import Range
from data_pipeline.readers.checks import Checker, missing_column
from data_pipeline.readers.times import seen_units, unit_of
from data_pipeline.sources import SourceFile

ROLES = ("user", "item", "time", "event")
SAMPLE_ROWS = 100_000  # looked at for a message, or for the unit of times without statistics

Told = tuple[str, str]  # a unit of time, and a place in the source that tells it


@dataclass(frozen=True)
class Kinds:
    """What the columns hold; "null": no values at all.

    user, item: "int64" or "string". time: "number", "datetime", "date" or "row" (no column). event: "string" or "none".
    """

    user: str
    item: str
    time: str
    event: str = "none"


@dataclass(frozen=True)
class Look:
    """What one file tells."""

    kinds: Kinds | None  # None: it has no rows
    from_path: tuple[str, ...] = ()  # columns that its path tells, not the file
    groups: tuple[parquet.RowGroup, ...] = ()  # of Parquet
    footer: Range = (0, 0)  # of Parquet: where it lies
    time_unit: str = "none"  # of datetimes
    told: tuple[Told, ...] = ()  # units that numeric times tell


def used(config: PrepareConfig) -> dict[str, str]:
    """The columns that are read, by role, in the order of `ROLES`."""
    named = {role: getattr(config, f"{role}_column") for role in ROLES}
    return {role: name for role, name in named.items() if name is not None}


def path_types(files: Sequence[SourceFile], config: PrepareConfig) -> dict[str, pa.DataType]:
    """Types of the columns that paths tell, guessed from all their values together."""
    types: dict[str, pa.DataType] = {}
    for name in used(config).values():
        values = {value for file in files for key, value in file.partition if key == name}
        if values:
            column = pl.Series(name, sorted(value for value in values if value is not None), dtype=pl.String)
            types |= text.guess_types(column.to_frame(), config.time_column)
    return types


def path_column(file: SourceFile, name: str, rows: int) -> pl.Series:
    """The column `name` for `rows` rows, as the file's path tells it."""
    return pl.Series(name, [dict(file.partition)[name]], dtype=pl.String).new_from_index(0, rows)


def look(file: SourceFile, path_types: dict[str, pa.DataType], config: PrepareConfig) -> Look:
    """Reads the footer or head of `file`.

    Raises
    ------
    GenattError
        Unreadable file, missing column, or a type that cannot be what the column is used for.
    """
    names = used(config)
    groups: tuple[parquet.RowGroup, ...] = ()
    footer = (0, 0)
    if file.format == "parquet":
        told = parquet.footer(file, list(names.values()), config.time_column)
        types, groups, footer = told.types, told.groups, (file.bytes - told.bytes, file.bytes)
        rows = sum(group.rows for group in groups)
    else:
        head = text.head(file, list(names.values()))
        if not head.names:  # JSON lines without a line
            return Look(None)
        types = {name: pa.null() for name in head.names} | text.guess_types(
            head.rows, config.time_column, quoted=file.format == "jsonl"
        )
        rows = head.rows.height
    from_path = tuple(name for name, _ in file.partition if name in names.values() and name not in types)
    types |= {name: path_types[name] for name in from_path}
    for role, name in names.items():
        if name not in types:
            raise missing_column(name, f"{role}_column", file.label, list(types))
    if not rows:
        return Look(None)
    if set(from_path) == set(names.values()):
        raise GenattError(f"{file.label} holds none of the columns {', '.join(from_path)}: name one of its own")

    for role, name in names.items():
        if name in from_path and role != "event" and dict(file.partition)[name] is None:
            raise GenattError(
                f"column {name!r} of {file.label} is null, its path says: take the file out of the source"
            )

    def sample(name: str) -> pl.Series:
        if name in from_path:
            return path_column(file, name, 1)
        return head.rows[name] if file.format != "parquet" else _sample(file, groups, name, footer)

    for role in ("user", "item"):
        if pa.types.is_floating(types[names[role]]):
            raise _float_ids(sample(names[role]), types[names[role]], file.label)
        if file.format == "csv" and pa.types.is_string(types[names[role]]) and config.id_type == "auto":
            _refuse_written_floats(sample(names[role]), file.label)
    kinds = Kinds(
        user=id_kind(names["user"], types[names["user"]], file.label, config),
        item=id_kind(names["item"], types[names["item"]], file.label, config),
        time=time_kind(names["time"], types[names["time"]], file.label) if "time" in names else "row",
        event=_event_kind(names["event"], types[names["event"]], file.label) if "event" in names else "none",
    )
    time_unit = types[names["time"]].unit if kinds.time == "datetime" else "none"
    units: tuple[Told, ...] = ()
    if kinds.time == "number" and config.time_unit == "auto":
        units = _told_by_statistics(groups, file.label) if names["time"] not in from_path else ()
        if not any(group.times for group in groups):
            units = _told_by_values(sample(names["time"]), file.label)
    return Look(kinds, from_path, groups, footer, time_unit, units)


def id_kind(name: str, type_: pa.DataType, label: str, config: PrepareConfig) -> str:
    """The kind of an id column of `type_`; `GenattError` where that is no type of ids."""
    type_ = type_.value_type if pa.types.is_dictionary(type_) else type_
    if pa.types.is_null(type_):
        return "null"
    if _is_text(type_):
        return "string"
    if pa.types.is_integer(type_) or (_is_decimal(type_) and type_.scale == 0):
        return "int64" if config.id_type == "auto" else "string"
    raise GenattError(f"column {name!r} of {label} has type {type_}: ids must be integers or strings: cast it first")


def time_kind(name: str, type_: pa.DataType, label: str) -> str:
    """The kind of a time column of `type_`; `GenattError` where that is no type of times."""
    if pa.types.is_null(type_):
        return "null"
    if pa.types.is_integer(type_) or pa.types.is_floating(type_):
        return "number"
    if pa.types.is_timestamp(type_):
        return "datetime"
    if pa.types.is_date32(type_):
        return "date"
    raise GenattError(
        f"column {name!r} of {label} has type {type_}: times are numbers or datetimes, in text files "
        "also ISO 8601 dates, all written alike: mend or cast it first"
    )


def _event_kind(name: str, type_: pa.DataType, label: str) -> str:
    type_ = type_.value_type if pa.types.is_dictionary(type_) else type_
    if pa.types.is_null(type_) or _is_text(type_) or pa.types.is_integer(type_):
        return "string"
    raise GenattError(f"column {name!r} of {label} has type {type_}: events must be strings or integers: cast it first")


def _is_decimal(type_: pa.DataType) -> bool:
    """Whether it is a decimal that Polars has, too: of 38 digits at most."""
    return bool(pa.types.is_decimal(type_) and not pa.types.is_decimal256(type_))


def _is_text(type_: pa.DataType) -> bool:
    return bool(pa.types.is_string(type_) or pa.types.is_large_string(type_) or pa.types.is_string_view(type_))


def _sample(file: SourceFile, groups: Sequence[parquet.RowGroup], name: str, footer: Range) -> pl.Series:
    """The first rows of a Parquet column."""
    group = next(number for number, group in enumerate(groups) if group.rows)
    ranges = (*groups[group].ranges, footer)
    return next(parquet.frames(file, [group], [name], ranges, SAMPLE_ROWS))[name]


def _told_by_statistics(groups: Sequence[parquet.RowGroup], label: str) -> tuple[Told, ...]:
    told: dict[str, str] = {}
    first_row = 0
    for group in groups:
        for number in group.times or ():
            told.setdefault(unit_of(number), f"{label} ({number} in rows {first_row} to {first_row + group.rows - 1})")
        first_row += group.rows
    return tuple((unit, where) for unit, where in told.items() if unit != "none")


def _told_by_values(column: pl.Series, label: str) -> tuple[Told, ...]:
    times = Checker(label, 0).times(column, "number", "none")
    return tuple((unit, f"{label} ({value} at row {row})") for unit, (row, value) in seen_units(times).items())


def _float_ids(column: pl.Series, type_: pa.DataType, label: str) -> GenattError:
    """The error for floats as ids: what pandas makes of integers where some are missing."""
    bad = ~(column == column.floor()).fill_null(False) | column.is_nan().fill_null(True)
    found = f"all of its first {len(column)} values are whole numbers"
    if count := int(bad.sum()):
        row = int(bad.arg_max() or 0)
        found = (
            f"{count} of its first {len(column)} values are null, NaN or fractions, first {column[row]!r} at row {row}"
        )
    return GenattError(
        f"column {column.name!r} of {label} has type {type_}: {found}: ids must be integers or strings: drop rows "
        "without an id and cast it to int64 (pandas makes floats of integers where some are missing)"
    )


def _refuse_written_floats(column: pl.Series, label: str) -> None:
    """Refuses a CSV column of ids like `7.0`: pandas wrote floats, and `7` elsewhere would be another id."""
    values = column.drop_nulls()
    if len(values) and values.str.contains(r"^-?[0-9]+\.0$").all():
        raise GenattError(
            f"column {column.name!r} of {label} holds ids like {values[0]}: write them as integers (pandas makes "
            "floats of integers where some are missing), or set id_type=string to keep them as they are"
        )
