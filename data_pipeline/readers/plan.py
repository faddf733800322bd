"""What is known before any row is read: columns, kinds, the unit of times, and which rows each task reads.

Footers and heads are looked at, `LOOKS` at a time; nearly all that is wrong with a source shows here. A time range
prunes files by their partitions, unopened, and row groups by their statistics; the rest is filtered exactly later.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import polars as pl
import pyarrow as pa

from data_pipeline.config import PrepareConfig
from data_pipeline.errors import GenattError
from data_pipeline.readers.access import Range
from data_pipeline.readers.checks import Checker, mixed_units
from data_pipeline.readers.columns import Kinds, Look, Told, look, path_types, time_kind, used
from data_pipeline.readers.parquet import merged
from data_pipeline.readers.times import DAY, FACTORS, in_unit
from data_pipeline.sources import Source, SourceFile

LOOKS = 32  # remote footers are waiting, not computing
TEXT_ROW_BYTES = 32  # taken for a row of a text file where tasks are made of about equal size


@dataclass(frozen=True)
class Chunk:
    """The rows one task reads: some row groups of a Parquet file, or a whole text file."""

    file: int
    row_groups: tuple[int, ...] = ()
    first_row: int = 0
    rows: int | None = None  # None: not known before they are read
    ranges: tuple[Range, ...] = ()  # bytes of a Parquet file that hold its columns, and the footer last
    from_path: tuple[str, ...] = ()  # columns that the file's path tells, not the file


@dataclass(frozen=True)
class Plan:
    """Everything known before the data is read."""

    files: tuple[SourceFile, ...]
    kinds: Kinds
    chunks: tuple[Chunk, ...]
    tasks: tuple[tuple[int, ...], ...] = ()  # numbers of neighbouring chunks that are little enough for one task
    time_unit: str = "none"  # of all timestamps: s, ms, us, ns; "day"; "row" (no time column); "none" (numbers without)
    time_told: str = ""  # where in the source the unit of numeric times shows
    time_from: int | None = None  # in time_unit
    time_to: int | None = None
    times: Range | None = None  # least and greatest to read, by statistics; None unless all row groups have them
    rows: int | None = None  # in all chunks; None with text files, whose rows are counted as they are read
    pruned_rows: int = 0  # in row groups outside the time range, by their statistics
    pruned_files: int = 0  # in partitions outside the time range: never opened, so their rows are not known
    bytes: int = 0  # to read


def plan(source: Source, config: PrepareConfig) -> Plan:
    """Looks at every file: are the columns there, are their types usable, and the same in all files?

    Raises
    ------
    GenattError
        Unreadable file; missing column, unusable type, types or units of time that differ between files; an empty or
        unreadable time range, or one that no row can be in.
    """
    types = path_types(source.files, config)
    outside = _outside(source.files, types, config)
    numbers = [number for number in range(len(source.files)) if number not in outside]
    with ThreadPoolExecutor(LOOKS) as pool:
        looks = list(pool.map(lambda number: look(source.files[number], types, config), numbers))
    seen = {number: it for number, it in zip(numbers, looks, strict=True) if it.kinds is not None}
    if not seen:
        raise _nothing(source, config, pruned=bool(outside))
    kinds = _common_kinds(source.files, seen, config)
    unit, told = _common_unit(seen, kinds, config)
    time_from, time_to = _bounds(config, unit)

    chunks: list[Chunk] = []
    pruned_rows = 0
    times: list[Range | None] = []
    for number, it in seen.items():
        if source.files[number].format != "parquet":
            times.append(None)
            chunks.append(Chunk(number, from_path=it.from_path))
            continue
        scale = FACTORS[unit] // FACTORS[it.time_unit] if it.time_unit in FACTORS else 1
        kept = [_inside(group.times, time_from, time_to, scale) for group in it.groups]
        times.extend(
            None if group.times is None else (group.times[0] * scale, group.times[1] * scale)
            for group, keep in zip(it.groups, kept, strict=True)
            if keep and group.rows
        )
        pruned_rows += sum(group.rows for group, keep in zip(it.groups, kept, strict=True) if not keep)
        chunks.extend(_grouped(number, it, kept, config.rows_per_block))
    if not chunks:
        raise _nothing(source, config, pruned=True)
    rows = [chunk.rows for chunk in chunks]
    return Plan(
        files=source.files,
        kinds=kinds,
        chunks=tuple(chunks),
        tasks=_tasks(source.files, chunks, config.rows_per_block),
        time_unit=unit,
        time_told=told,
        time_from=time_from,
        time_to=time_to,
        times=_span(times),
        rows=None if None in rows else sum(count or 0 for count in rows),
        pruned_rows=pruned_rows,
        pruned_files=len(outside),
        bytes=sum(_bytes(source.files[chunk.file], chunk) for chunk in chunks),
    )


def _outside(files: Sequence[SourceFile], types: dict[str, pa.DataType], config: PrepareConfig) -> set[int]:
    """Numbers of the files whose path says that all their times are outside the time range.

    A time in a path may stand for the day it begins: the file may hold the exact times in a column of the same name.
    """
    name = config.time_column
    if name is None or name not in types or (config.time_from is None and config.time_to is None):
        return set()
    if not (pa.types.is_integer(types[name]) or pa.types.is_timestamp(types[name])):  # no time: the files' own column
        return set()
    values = {number: dict(file.partition).get(name) for number, file in enumerate(files)}
    numbers = [number for number, value in values.items() if value is not None]
    column = pl.Series(name, [values[number] for number in numbers], dtype=pl.String)
    label = "the source's paths"
    kind, check = time_kind(name, types[name], label), Checker(label, 0)
    unit: str = types[name].unit if kind == "datetime" else config.time_unit
    times = check.times(column, kind, unit)
    if kind == "number" and unit == "auto":
        unit, _ = check.one_unit(times, name, ("none", ""))
    time_from, time_to = _bounds(config, unit)
    day = DAY * FACTORS.get(unit, 0)
    return {
        number
        for number, time in zip(numbers, times.to_list(), strict=True)
        if not _inside((time, time + max(0, day - 1)), time_from, time_to, 1)
    }


def _common_kinds(files: Sequence[SourceFile], seen: dict[int, Look], config: PrepareConfig) -> Kinds:
    """The kinds of all files; `GenattError` for a column that has different ones."""
    common: dict[str, tuple[str, SourceFile]] = {}
    for number, it in seen.items():
        for role in used(config):
            kind = getattr(it.kinds, role)
            if kind == "null":  # no value, no say
                continue
            first, where = common.setdefault(role, (kind, files[number]))
            if kind != first:
                mend = "" if role == "time" else ", or set id_type=string"
                raise GenattError(
                    f"column {used(config)[role]!r} has mixed types: {first} in {where.label}, "
                    f"{kind} in {files[number].label}: write both with one type{mend}"
                )
    kinds = {role: common[role][0] if role in common else "null" for role in used(config)}
    return Kinds(**{"time": "row"} | kinds)


def _common_unit(seen: dict[int, Look], kinds: Kinds, config: PrepareConfig) -> Told:
    """The unit of all times and where it shows; `GenattError` for numbers in two units.

    Datetimes are told apart by their type, so they may differ between files: the finest holds them all.
    """
    if kinds.time == "row":
        return "row", ""
    if kinds.time == "date":
        return "day", ""
    if kinds.time == "datetime":
        return max((it.time_unit for it in seen.values() if it.time_unit in FACTORS), key=FACTORS.__getitem__), ""
    if config.time_unit != "auto":
        return config.time_unit, ""
    told = [one for it in seen.values() for one in it.told]
    for one in told:
        if one[0] != told[0][0]:
            raise mixed_units(str(config.time_column), one, told[0])
    return told[0] if told else ("none", "")


def _bounds(config: PrepareConfig, unit: str) -> tuple[int | None, int | None]:
    """The time range in `unit`."""
    time_from = None if config.time_from is None else in_unit(config.time_from, unit, "time_from")
    time_to = None if config.time_to is None else in_unit(config.time_to, unit, "time_to")
    if time_from is not None and time_to is not None and time_from >= time_to:
        raise GenattError(f"{_range_text(config)} is an empty range: give a time_to after time_from")
    return time_from, time_to


def _inside(times: Range | None, time_from: int | None, time_to: int | None, scale: int) -> bool:
    """Whether a time between the least and greatest of `times` (each times `scale`) can be in the range."""
    if times is None:
        return True
    return (time_from is None or times[1] * scale >= time_from) and (time_to is None or times[0] * scale < time_to)


def _span(times: Sequence[Range | None]) -> Range | None:
    known = [one for one in times if one is not None]
    if not known or len(known) < len(times):
        return None
    return min(low for low, _ in known), max(high for _, high in known)


def _grouped(file: int, it: Look, kept: Sequence[bool], rows_per_block: int) -> Iterator[Chunk]:
    """Chunks of neighbouring row groups that are `kept`, with at most `rows_per_block` rows, or one group."""
    members: list[int] = []
    first_row = held = 0

    def chunk() -> Chunk:
        ranges = merged([part for group in members for part in it.groups[group].ranges])
        return Chunk(file, tuple(members), first_row, held, (*ranges, it.footer), it.from_path)

    for number, group in enumerate(it.groups):
        if members and (not kept[number] or held + group.rows > rows_per_block):
            yield chunk()
            first_row, held, members = first_row + held, 0, []
        if kept[number]:
            members.append(number)
            held += group.rows
        else:
            first_row += group.rows
    if held:
        yield chunk()


def _tasks(files: Sequence[SourceFile], chunks: Sequence[Chunk], rows_per_block: int) -> tuple[tuple[int, ...], ...]:
    """Neighbours together up to `rows_per_block` rows: starting a task for each of ten thousand small files is slow."""
    tasks: list[list[int]] = []
    held = 0
    for number, chunk in enumerate(chunks):
        rows = files[chunk.file].bytes // TEXT_ROW_BYTES if chunk.rows is None else chunk.rows
        if not tasks or held + rows > rows_per_block:
            tasks.append([])
            held = 0
        tasks[-1].append(number)
        held += rows
    return tuple(tuple(task) for task in tasks)


def _bytes(file: SourceFile, chunk: Chunk) -> int:
    return sum(stop - start for start, stop in chunk.ranges) if chunk.ranges else file.bytes


def _nothing(source: Source, config: PrepareConfig, pruned: bool) -> GenattError:
    if pruned:
        return GenattError(f"source {source.name} has no rows in {_range_text(config)}: widen the range")
    return GenattError(f"source {source.name} has no rows in its {len(source.files)} file(s): nothing to prepare")


def _range_text(config: PrepareConfig) -> str:
    given = {"time_from": config.time_from, "time_to": config.time_to}
    return ", ".join(f"{option}={value}" for option, value in given.items() if value is not None)
