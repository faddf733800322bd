"""`genatt inspect`: what a prepared directory holds, from its manifest, index and vocabulary; sequences stay unread."""

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from rich import filesize
from rich.bar import Bar
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table
from rich.text import Text

from data_pipeline import format as shards
from data_pipeline.errors import GenattError
from data_pipeline.format import BUCKETS, VOCABULARY, Manifest, ShardFile
from data_pipeline.progress import dropped_text
from data_pipeline.splits import NONE
from data_pipeline.storage import check_access, one_line, opened, redact

QUANTILES = {"min": 0.0, "p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
TITLES = ("title", "name")  # attribute columns that name an item, the first that is there
_READERS = 16  # files read at a time: waiting for a store, not computing
_BAR = 40


@dataclass(frozen=True)
class SplitSizes:
    """Interactions that train, and users with a target in either held-out part."""

    train_interactions: int
    valid_users: int
    test_users: int


@dataclass(frozen=True)
class Bin:
    """Users with `low` to `high` interactions, both included."""

    low: int
    high: int
    users: int


@dataclass(frozen=True)
class TopItem:
    """An item by its original id; share: of all counts, as they are, before `max_history`."""

    item_id: int | str
    title: str | None
    count: int
    share: float


@dataclass(frozen=True)
class Files:
    """The shards' files; skew: the users of the largest over the mean."""

    number: int
    bytes: int
    users_min: int
    users_max: int
    skew: float


@dataclass(frozen=True)
class Inspection:
    """All that `genatt inspect` shows. `lengths`: `QUANTILES` of a user's number of interactions."""

    path: str
    name: str
    users: int
    items: int
    interactions: int
    split: dict[str, Any]
    split_sizes: SplitSizes
    ledger: tuple[dict[str, Any], ...]
    lengths: dict[str, int]
    histogram: tuple[Bin, ...]
    top_items: tuple[TopItem, ...]
    files: Files
    bytes: int
    time_unit: str | None
    parent: str | None
    drift: dict[str, int] | None
    config_hash: str
    manifest_hash: str

    def as_data(self) -> dict[str, Any]:
        """As JSON takes it."""
        return asdict(self)


def inspect(path: str, top: int = 10) -> Inspection:
    """What the prepared directory `path` (any fsspec path) holds; `top`: how many of the most frequent items.

    Raises
    ------
    GenattError
        Nothing prepared is there, it cannot be read, or what is there is damaged or contradicts its manifest.
    """
    check_access(path)
    manifest = shards.load_manifest(path)
    lengths, sizes = _users(path, manifest)
    users = [file.users for file in manifest.files]
    return Inspection(
        path=redact(path),
        name=manifest.name,
        users=manifest.num_users,
        items=manifest.num_items,
        interactions=manifest.num_interactions,
        split=manifest.split.model_dump(),
        split_sizes=sizes,
        ledger=tuple(entry.model_dump() for entry in manifest.ledger),
        lengths=quantiles(lengths),
        histogram=histogram(lengths),
        top_items=_top_items(path, manifest, top),
        files=Files(
            number=len(users),
            bytes=sum(file.bytes for file in manifest.files),
            users_min=min(users, default=0),
            users_max=max(users, default=0),
            skew=max(users, default=0) * len(users) / sum(users) if sum(users) else 0.0,
        ),
        bytes=sum(file.bytes for file in manifest.written),
        time_unit=manifest.time_unit,
        parent=manifest.parent,
        drift=manifest.drift,
        config_hash=manifest.config_hash,
        manifest_hash=shards.manifest_hash(path),
    )


def quantiles(counts: npt.NDArray[np.int64]) -> dict[str, int]:
    """`QUANTILES` of values of which `counts[v]` are v: the least value that a share of them does not exceed."""
    total = int(counts.sum())
    if not total:
        return dict.fromkeys(QUANTILES, 0)
    reached = np.cumsum(counts)
    wanted = {name: max(1, int(np.ceil(share * total))) for name, share in QUANTILES.items()}
    return {name: int(np.searchsorted(reached, rank)) for name, rank in wanted.items()}


def histogram(counts: npt.NDArray[np.int64]) -> tuple[Bin, ...]:
    """Bins 1, 2, 3, 4 to 5, 6 to 7, 8 to 11, …, two to a doubling, from the first to the last that holds any."""
    values = np.flatnonzero(counts[1:]) + 1
    if not len(values):
        return ()
    starts = sorted({math.ceil(2 ** (half / 2)) for half in range(2 * int(values[-1]).bit_length() + 1)})
    bins = [Bin(low, high - 1, int(counts[low:high].sum())) for low, high in pairwise(starts)]
    return tuple(one for one in bins if one.high >= values[0] and one.low <= values[-1])


def verify(path: str, console: Console) -> None:
    """Checks size and sha256 of every file, with a bar; `GenattError` names the first that differs."""
    check_access(path)
    manifest = shards.load_manifest(path)
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task("", total=sum(file.bytes for file in manifest.written))
        shards.verify(path, manifest, lambda amount: progress.update(task, advance=amount))


def show(found: Inspection, console: Console) -> None:
    """Prints `found` as tables."""
    for line in (_heading(found), *_facts(found)):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    console.print(_ledger_table(found), _length_table(found), _items_table(found), sep="\n")


def _users(path: str, manifest: Manifest) -> tuple[npt.NDArray[np.int64], SplitSizes]:
    """How many users have each length [longest + 1], and the sizes of the split: sums over the index files."""

    def one(file: ShardFile) -> tuple[npt.NDArray[np.int64], tuple[int, int, int]]:
        index = shards.read_index(path, file)
        lengths = index["length"].to_numpy()
        if len(lengths) != file.users or lengths.sum() != file.interactions:
            raise GenattError(
                f"{redact(path)}/{file.index.path} has {len(lengths)} users and {lengths.sum()} interactions, the "
                f"manifest says {file.users} and {file.interactions}: {shards.MEND}"
            )
        held = [int(pc.sum(pc.not_equal(index[name], NONE)).as_py() or 0) for name in ("valid", "test")]
        return np.bincount(lengths), (int(index["train"].to_numpy().sum(dtype=np.int64)), held[0], held[1])

    total, sizes = np.zeros(1, np.int64), np.zeros(3, np.int64)
    with ThreadPoolExecutor(_READERS) as pool:
        for counts, three in pool.map(one, manifest.files):
            if len(counts) > len(total):
                total = np.pad(total, (0, len(counts) - len(total)))
            total[: len(counts)] += counts
            sizes += three
    return total, SplitSizes(*map(int, sizes))


def _top_items(path: str, manifest: Manifest, top: int) -> tuple[TopItem, ...]:
    # With hash buckets several items share a row of the vocabulary; their own counts are beside it.
    name = VOCABULARY if manifest.buckets is None else BUCKETS
    with _parquet(path, name) as file:
        title = next((column for column in TITLES if column in file.schema_arrow.names), None)
        rows = pl.DataFrame(file.read(["item_id", "count", *([title] if title else [])]))
    total = int(rows["count"].sum())  # with max_history, more than the interactions: counts are from before it
    rows = rows.with_row_index("place").top_k(top, by=[pl.col("count"), -pl.col("place").cast(pl.Int64)])
    rows = rows.sort("count", "place", descending=[True, False])
    titles = rows[title].cast(pl.String).to_list() if title else [None] * rows.height
    total = max(total, 1)
    return tuple(
        TopItem(item_id, text, count, count / total)
        for item_id, text, count in zip(rows["item_id"].to_list(), titles, rows["count"].to_list(), strict=True)
    )


@contextmanager
def _parquet(path: str, name: str) -> Iterator[pq.ParquetFile]:
    try:
        with opened(f"{path.rstrip('/')}/{name}") as stream, pq.ParquetFile(stream) as file:
            yield file
    except (OSError, pa.ArrowException) as error:
        raise GenattError(f"cannot read {redact(path)}/{name}: {one_line(error)}: {shards.MEND}") from error


def _heading(found: Inspection) -> str:
    return f"{found.name}: {found.users:,} users, {found.items:,} items, {found.interactions:,} interactions"


def _facts(found: Inspection) -> list[str]:
    sizes, files = found.split_sizes, found.files
    options = ", ".join(f"{key} {value}" for key, value in found.split.items() if key != "rule")
    lines = [
        f"split: {found.split['rule']} ({options}): {sizes.train_interactions:,} interactions train, "
        f"{sizes.valid_users:,} users have a valid target, {sizes.test_users:,} a test target",
        f"files: {files.number:,} shards, {filesize.decimal(files.bytes)} ({filesize.decimal(found.bytes)} with index "
        f"and vocabulary), {files.users_min:,} to {files.users_max:,} users each, the largest {files.skew:.2f} times "
        "the mean",
        f"time unit: {found.time_unit or 'not known'}",
    ]
    if found.parent:
        lines.append(f"parent: {found.parent}")
    if found.drift:
        lines.append("drift: " + ", ".join(f"{key} {value:,}" for key, value in found.drift.items()))
    return [*lines, f"config {found.config_hash}", f"manifest {found.manifest_hash}"]


def _ledger_table(found: Inspection) -> Table:
    table = Table(title="rows", title_justify="left")
    for heading in ("stage", "in", "out", "dropped"):
        table.add_column(heading, justify="right" if heading in ("in", "out") else "left")
    for fields in found.ledger:
        entry = shards.LedgerEntry(**fields)
        table.add_row(entry.stage, f"{entry.rows_in:,}", f"{entry.rows_out:,}", dropped_text(entry))
    return table


def _length_table(found: Inspection) -> Table:
    told = ", ".join(f"{name} {value:,}" for name, value in found.lengths.items())
    table = Table(title=f"interactions of a user: {told}", title_justify="left")
    table.add_column("length", justify="right")
    table.add_column("users", justify="right")
    table.add_column("")
    most = max((one.users for one in found.histogram), default=1)
    for one in found.histogram:
        label = f"{one.low:,}" if one.low == one.high else f"{one.low:,} to {one.high:,}"
        table.add_row(label, f"{one.users:,}", Bar(most, 0, one.users, width=_BAR))
    return table


def _items_table(found: Inspection) -> Table:
    titled = any(item.title is not None for item in found.top_items)
    table = Table(title=f"top {len(found.top_items)} items", title_justify="left")
    table.add_column("item")
    if titled:
        table.add_column("title")
    table.add_column("count", justify="right")
    table.add_column("share", justify="right")
    for item in found.top_items:
        title = [Text(item.title or "")] if titled else []
        table.add_row(Text(str(item.item_id)), *title, f"{item.count:,}", f"{item.share:.2%}")
    return table
