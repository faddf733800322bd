"""`genatt prepare --dry-run`: what a preparation would read, do and need; nothing is written, Ray is not started.

Counts come from footers and listings and are exact unless they are named estimates. Each estimate says how it is made:
it is for choosing a machine, not for accounting.
"""

import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich import filesize
from rich.console import Console
from rich.table import Table
from rich.text import Text

from data_pipeline.config import PrepareConfig
from data_pipeline.local_ray import cpus, store_bytes
from data_pipeline.planning import look
from data_pipeline.prepare import num_shards
from data_pipeline.readers import Plan
from data_pipeline.readers.columns import used
from data_pipeline.readers.times import DAY, EPOCH, FACTORS
from data_pipeline.redaction import redact
from data_pipeline.sources import SourceFile
from data_pipeline.storage import check_access, check_free, read_ranges

HEAD_BYTES = 1 << 20
HEADS = 16  # text files looked into, to estimate the rows of all
ID_BYTES = {"int64": 8, "string": 24, "null": 8}  # text of up to 16 bytes, and where it begins
TASK_COPIES = 3  # of its rows that a task holds at a time
WORKER_BYTES = 150 << 20  # a Python process with Arrow and Polars
WORKERS = 2  # that Ray keeps for each CPU
RAY_BYTES = 600 << 20  # Ray's own processes and the driver


@dataclass(frozen=True)
class Column:
    """A column that is read: what for, its name in the source, and what kind of values it holds."""

    role: str
    column: str
    kind: str


@dataclass(frozen=True)
class Rows:
    """Rows to read; estimated: from the heads of text files."""

    number: int
    estimated: bool


@dataclass(frozen=True)
class Estimate:
    """A size in bytes nobody knows yet, and how it was guessed."""

    what: str
    bytes: int
    basis: str


@dataclass(frozen=True)
class Step:
    """A stage and what it does under these options."""

    stage: str
    does: str


@dataclass(frozen=True)
class DryRun:
    """All that `--dry-run` shows. `times`: least and greatest to read, in `time_unit`; None where nothing tells."""

    name: str
    source: str
    out: str
    files: int
    formats: dict[str, int]
    bytes: int
    bytes_to_read: int
    schema: tuple[Column, ...]
    time_unit: str
    times: tuple[int, int] | None
    time_from: int | None
    time_to: int | None
    rows: Rows
    pruned_rows: int
    pruned_files: int
    read_tasks: int
    shards: int
    estimates: tuple[Estimate, ...]
    steps: tuple[Step, ...]
    parent: str | None

    def as_data(self) -> dict[str, Any]:
        """As JSON takes it."""
        return asdict(self)


def dry_run(config: PrepareConfig) -> DryRun:
    """Looks at the source as `prepare` would before Ray starts.

    Raises
    ------
    GenattError
        As `prepare` before Ray starts, also where `out` exists. Whether it can be written is not tried.
    """
    check_access(config.out)
    check_free(config.out)
    with tempfile.TemporaryDirectory(prefix="genatt-") as workdir:
        looked = look(config, Path(workdir))
        config, planned, source, parent = looked.config, looked.plan, looked.source, looked.parent
        rows = _rows(planned)
    columns = tuple(Column(role, column, getattr(planned.kinds, role)) for role, column in used(config).items())
    count = num_shards(planned, config)
    return DryRun(
        name=source.name,
        source=redact(config.source),
        out=redact(config.out),
        files=len(planned.files),
        formats=dict(Counter(file.format for file in planned.files)),
        bytes=sum(file.bytes for file in planned.files),
        bytes_to_read=planned.bytes,
        schema=columns,
        time_unit=planned.time_unit,
        times=planned.times,
        time_from=planned.time_from,
        time_to=planned.time_to,
        rows=rows,
        pruned_rows=planned.pruned_rows,
        pruned_files=planned.pruned_files,
        read_tasks=len(planned.tasks),
        shards=count,
        estimates=_estimates(planned, rows.number, count, config),
        steps=tuple(_steps(planned, count, config, None if source.items is None else source.items.label)),
        parent=None if parent is None else parent.hash,
    )


def show(found: DryRun, console: Console) -> None:
    """Prints `found` as tables."""
    table = Table(title=Text(f"{found.name}: dry run, nothing is written"), title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column()
    for name, value in _facts(found):
        table.add_row(name, Text(value))
    steps = Table(title="stages", title_justify="left", show_header=False)
    steps.add_column(style="bold")
    steps.add_column()
    for step in found.steps:
        steps.add_row(step.stage, Text(step.does))
    guesses = Table(title="estimates", title_justify="left")
    for heading in ("of", "size", "basis"):
        guesses.add_column(heading, justify="right" if heading == "size" else "left")
    for guess in found.estimates:
        guesses.add_row(guess.what, filesize.decimal(guess.bytes), guess.basis)
    console.print(table, steps, guesses, sep="\n")


def _rows(planned: Plan) -> Rows:
    known = sum(chunk.rows or 0 for chunk in planned.chunks)
    text = [planned.files[chunk.file] for chunk in planned.chunks if chunk.rows is None]
    if not text:
        return Rows(known, estimated=False)
    looked = [_head_rows(file) for file in text[:: max(1, len(text) // HEADS)][:HEADS]]
    share = sum(rows for rows, _ in looked) / max(1, sum(size for _, size in looked))
    return Rows(known + round(share * sum(file.bytes for file in text)), estimated=True)


def _head_rows(file: SourceFile) -> tuple[int, int]:
    """Lines in the head of a text file, and how many of its bytes they take."""
    size = min(file.bytes, HEAD_BYTES)
    (raw,) = read_ranges(file.path, [(0, size)])
    text = raw
    if file.path.lower().endswith(".gz"):
        unpacking = zlib.decompressobj(wbits=31)
        text = unpacking.decompress(raw, 8 * HEAD_BYTES)
        size -= len(unpacking.unconsumed_tail)
    lines = text.count(b"\n") + (size == file.bytes and not text.endswith(b"\n"))
    return max(0, lines - (file.format == "csv")), size


def _estimates(planned: Plan, rows: int, shards: int, config: PrepareConfig) -> tuple[Estimate, ...]:
    weight = 4 if config.event_column else 0
    row = ID_BYTES[planned.kinds.user] + ID_BYTES[planned.kinds.item] + 8 + 4 + weight
    shuffled, written = rows * row, rows * (4 + 8 + weight)
    store = config.object_store_bytes or store_bytes(config.num_cpus)
    num_cpus = config.num_cpus or cpus()
    block = max((chunk.rows or config.rows_per_block for chunk in planned.chunks), default=0)
    task_rows = max(min(block, rows), -(-rows // shards))
    processes = RAY_BYTES + num_cpus * WORKERS * WORKER_BYTES
    tasks = num_cpus * TASK_COPIES * task_rows * row
    used_store = min(store, shuffled)
    size = filesize.decimal
    text = ", text ids taken as 24 bytes" if "string" in (planned.kinds.user, planned.kinds.item) else ""
    return (
        Estimate("shuffle", shuffled, f"all rows once, {row} bytes a row{text}"),
        Estimate(
            "spill to disk",
            max(0, shuffled - store),
            f"what of it does not fit into Ray's object store of {size(store)}",
        ),
        Estimate("output", written, f"at most: {4 + 8 + weight} bytes a row before compression, nothing dropped"),
        Estimate(
            "memory",
            processes + used_store + tasks,
            f"processes {size(processes)}, object store {size(used_store)}, {num_cpus} tasks with {TASK_COPIES} "
            f"copies of {task_rows:,} rows each",
        ),
    )


def _steps(planned: Plan, shards: int, config: PrepareConfig, items: str | None) -> Sequence[Step]:
    block = f"{len(planned.tasks):,} tasks: about {config.rows_per_block:,} rows of Parquet, or a text file, each"
    cleaning = []
    if planned.time_from is not None or planned.time_to is not None:
        bounds = {"from": planned.time_from, "before": planned.time_to}
        kept = [f"{name} {value}" for name, value in bounds.items() if value is not None]
        cleaning.append(f"keep times {', '.join(kept)}")
    if config.event_weights is not None:
        weights = ", ".join(f"{event} {weight:g}" for event, weight in config.event_weights.items())
        cleaning.append(f"weigh events ({weights}), drop others")
    rules = [f"min_count {config.min_count}, rarer items: {config.out_of_vocabulary}"] if config.min_count > 1 else []
    rules += [f"items hashed into {config.hash_buckets:,} ids"] if config.hash_buckets else []
    rules += [f"attributes of {items}"] if items else []
    rules += [f"newest {config.max_history:,} interactions of a user"] if config.max_history else []
    fields = config.split.model_dump()
    rule = fields.pop("rule")
    rules += [f"split {rule} ({', '.join(f'{key} {value}' for key, value in fields.items())})"]
    return (
        Step("read", "; ".join([block, *cleaning])),
        Step("order", f"{shards:,} shards by user, then time; drop duplicates: {config.duplicates}"),
        Step("encode", "items to codes"),
        Step("k-core", f"users with {config.min_user_interactions} rows, items with {config.min_item_interactions}"),
        Step("write", "; ".join([*rules, f"row groups of {config.row_group_size:,} users"])),
    )


def _facts(found: DryRun) -> list[tuple[str, str]]:
    date = _dates(found.time_unit)
    formats = ", ".join(f"{count:,} {name}" for name, count in found.formats.items())
    facts = [
        ("source", f"{found.source}: {formats} ({filesize.decimal(found.bytes)})"),
        ("output", found.out),
        *[(f"{one.role} column", f"{one.column} ({one.kind})") for one in found.schema],
        ("time unit", found.time_unit),
    ]
    if found.times:
        facts.append(("times to read", f"{date(found.times[0])} to {date(found.times[1])}"))
    else:
        facts.append(("times to read", "not known before they are read"))
    bounds = {"from": found.time_from, "before": found.time_to}
    if kept := [f"{name} {date(value)}" for name, value in bounds.items() if value is not None]:
        facts.append(("times kept", ", ".join(kept)))
    rows = f"{found.rows.number:,}"
    facts += [
        ("rows", f"about {rows} (estimate from the heads of text files)" if found.rows.estimated else rows),
        ("pruned", f"{found.pruned_rows:,} rows by statistics, {found.pruned_files:,} files by partition"),
        ("to read", f"{filesize.decimal(found.bytes_to_read)} in {found.read_tasks:,} tasks"),
        ("shards", f"{found.shards:,}"),
    ]
    return [*facts, ("parent", found.parent)] if found.parent else facts


def _dates(unit: str) -> Callable[[int], str]:
    """How to write a time in `unit`: with its date where it has one."""
    seconds = {"day": float(DAY)} | {name: 1 / factor for name, factor in FACTORS.items()}

    def date(value: int) -> str:
        try:
            return f"{value} ({(EPOCH + timedelta(seconds=value * seconds[unit])).isoformat(timespec='seconds')})"
        except (KeyError, OverflowError):
            return str(value)

    return date
