"""From a raw log to a published directory of sequences: the stages, in order."""

import hashlib
import itertools
import math
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import ray
from pydantic import ValidationError

from data_pipeline import tasks, vocabulary
from data_pipeline.append import drift_text
from data_pipeline.clean import Dropped
from data_pipeline.closing import check_counts, defect, split_notes
from data_pipeline.config import PrepareConfig
from data_pipeline.errors import GenattError
from data_pipeline.format import (
    BUCKETS,
    MANIFEST,
    VOCABULARY,
    LedgerEntry,
    Manifest,
    RawFile,
    WrittenFile,
    parquet_bytes,
)
from data_pipeline.k_core import Flags, Ints, Items
from data_pipeline.local_ray import local_ray, numbered, outputs, results, run, value_of
from data_pipeline.memory import MemorySampler, SpillCounter
from data_pipeline.planning import Planned, look
from data_pipeline.progress import Stage, Stages, Usage
from data_pipeline.readers import Plan, read_table
from data_pipeline.storage import check_access, one_line, publishing, write_bytes
from data_pipeline.vocabulary import Tally, Vocabulary

LEAST_SHARDS = 8
ROWS_PER_SHARD = 1_000_000  # what one task orders in memory: some 100 bytes a row
TEXT_ROW_BYTES = 32  # a guess at a row of CSV or JSON, for the number of shards alone
READ_RETRIES = 3  # of a task whose worker is killed; Ray Data's own tasks are tried without end
SLICE_BYTES = 1 << 18  # smaller objects would be kept in the driver's memory
VOCABULARY_ROW_GROUP = 1 << 16
MERGE_ROWS = 1 << 21  # item counts of the shards are merged when there are so many


def prepare(config: PrepareConfig, progress: bool = True, stages: Stages | None = None) -> Manifest:
    """Prepares `config.source` into the new directory `config.out`; the same input and options give the same bytes.

    With `config.append_to` the new directory holds the parent's interactions and the source's. Nothing is complete at
    `config.out` before all of it is: not after an error, and not after Ctrl-C.

    Parameters
    ----------
    progress
        Show one line a stage, and a table at the end, on stderr.
    stages
        Where to tell of the stages instead: the caller reads there how long each took.

    Raises
    ------
    GenattError
        Anything the user can mend; see `sources`, `readers`, `storage` and `local_ray`.
    """
    check_access(config.out)
    with (
        publishing(config.out) as directory,
        tempfile.TemporaryDirectory(prefix="genatt-") as workdir,
        stages or Stages(progress) as stages,
        MemorySampler() as memory,
    ):
        planned = look(config, Path(workdir))  # before Ray starts: most errors are known by now
        config = planned.config
        with local_ray(config.num_cpus, config.object_store_bytes, (config.source, config.out)) as ray_seconds:
            spill = SpillCounter()
            job = _Job(planned, directory, stages)
            manifest = job.run()
            spilled = spill.bytes()
        write_bytes(f"{directory}/{MANIFEST}", manifest.to_json())
        stages.usage = Usage(ray_seconds, spilled, memory.use())
    title = f"{manifest.name}: {manifest.num_users:,} users, {manifest.num_items:,} items"
    if manifest.drift is not None:
        title = f"{title}\nappended: {drift_text(manifest.drift)}"
    stages.summary(title, manifest.ledger)
    for note in job.notes:
        stages.console.print(note, highlight=False, markup=False, soft_wrap=True)
    return manifest


def num_shards(planned: Plan, config: PrepareConfig) -> int:
    """How many files users are hashed over: as asked, or one for each `ROWS_PER_SHARD` rows."""
    if config.num_shards is not None:
        return config.num_shards
    text = sum(file.bytes for file in planned.files if file.format != "parquet") // TEXT_ROW_BYTES
    return max(LEAST_SHARDS, math.ceil(((planned.rows or 0) + text) / ROWS_PER_SHARD))


@dataclass
class _Shard:
    """A shard between the stages. Large things are in Ray's object store; `alive` flags users, None: all."""

    number: int
    item: ray.ObjectRef | None
    columns: ray.ObjectRef | None
    users: ray.ObjectRef
    items: ray.ObjectRef | None
    codes: ray.ObjectRef | None = None
    exempt: ray.ObjectRef | None = None
    alive: ray.ObjectRef | None = None


class _Job:
    """One preparation; `run` is its stages in order, `notes` is what its user should know afterwards, a line each."""

    def __init__(self, planned: Planned, directory: str, stages: Stages) -> None:
        self._source, self._plan = planned.source, planned.plan
        self._config, self._parent = planned.config, planned.parent
        self._directory, self._stages = directory, stages
        self._num_shards = num_shards(self._plan, self._config)
        self._ledger: list[LedgerEntry] = []
        self.notes: list[str] = []

    def run(self) -> Manifest:
        """All stages; writes everything but the manifest, which it returns."""
        shards, counted = self._order(self._read())
        catalogue, counts = self._encode(shards, counted)
        items = self._k_core(shards, catalogue, counts.copy())
        known = None if self._parent is None else self._parent.items
        words = vocabulary.build(catalogue, np.where(items.alive, items.counts, 0), self._config, known)
        if not words.size:
            raise GenattError(
                f"no rows left of {self._ledger[-1].rows_out}: no item has {self._config.min_count} rows: lower "
                "min_count, or set out_of_vocabulary=bucket"
            )
        written = self._write(shards, items.alive, words)
        manifest = self._manifest(written, catalogue, words)
        if self._parent is None or items.exempt is None:
            return manifest
        rejected = sum(one.rejected for one in written)
        unknown = ~items.exempt
        drift = self._parent.drift(manifest, counts[unknown], words.dense_of_code[unknown], rejected)
        return manifest.model_copy(update={"drift": drift})

    def _read(self) -> list[list[ray.ObjectRef]]:
        """Reads and cleans the source; returns the slices of every shard, in the order of the source."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of `max_retries`, which has nothing in its place yet
            chunks = numbered("task", len(self._plan.tasks)).map_batches(
                tasks.read_block,
                fn_kwargs={"plan": self._plan, "config": self._config, "num_shards": self._num_shards},
                batch_format="pyarrow",
                batch_size=None,
                max_retries=READ_RETRIES,
            )
        split = ray.remote(tasks.split).options(num_returns=self._num_shards + 1)
        told: list[ray.ObjectRef] = []
        slices: list[list[ray.ObjectRef]] = [[] for _ in range(self._num_shards)]
        parts: list[ray.ObjectRef] = []
        with self._stages.stage("read", steps=len(self._plan.tasks)) as stage:
            for group in _grouped(outputs(chunks, "read"), SLICE_BYTES * self._num_shards, stage):
                first, *parts = split.remote(self._num_shards, *group)
                del group  # the blocks are not needed for longer
                told.append(first)
                for shard, part in zip(slices, parts, strict=True):
                    shard.append(part)
            parts.clear()  # the last references to what `slices` is emptied of
            rows, dropped = 0, {"outside_time_range": self._plan.pruned_rows}
            for _, counted in results(told, "read"):
                rows += counted.rows
                for reason, count in counted.dropped.items():
                    dropped[reason] = dropped.get(reason, 0) + count
            stage.rows_in, stage.rows_out = rows + sum(dropped.values()), rows
        expected, found = self._plan.rows, stage.rows_in - self._plan.pruned_rows
        if expected is not None and found != expected:
            raise GenattError(
                f"source {self._source.name}: {expected} rows when it was looked at, {found} when it was read: "
                "it changed meanwhile; start again when nobody writes to it"
            )
        self._tell("read", stage.rows_in, stage.rows_out, dropped)
        if not rows and self._parent is None:
            reasons = ", ".join(f"{count} {reason}" for reason, count in self._ledger[-1].dropped.items())
            raise GenattError(
                f"source {self._source.name}: none of {stage.rows_in} rows is left after reading: {reasons}: "
                "mend event_weights (events are told apart by case), time_from or time_to"
            )
        return slices

    def _order(self, slices: list[list[ray.ObjectRef]]) -> tuple[list[_Shard], pl.DataFrame]:
        """Orders every shard, and drops the slices as it goes; returns also all items (item_id) with their count."""
        order = ray.remote(tasks.order).options(num_returns=5)
        rows_in = self._ledger[-1].rows_out
        shards: dict[int, _Shard] = {}

        def start(number: int) -> ray.ObjectRef:
            told, *parts = order.remote(self._config, *slices[number])
            slices[number] = []  # the object store may drop them once they are used
            shards[number] = _Shard(number, *parts)
            return told

        duplicates = unmerged = 0
        counted: list[pl.DataFrame] = []
        with self._stages.stage("order", rows_in=rows_in, steps=self._num_shards) as stage:
            for number, one in run(start, self._num_shards, "order"):
                stage.advance(one.rows)
                duplicates += one.duplicates
                counted.append(pl.DataFrame(value_of(shards[number].items, "order")))
                unmerged += counted[-1].height
                if unmerged >= MERGE_ROWS:  # here, where the driver has time
                    counted, unmerged = [vocabulary.merge(counted)], 0
            catalogue = vocabulary.merge(counted).sort("item_id")
        self._tell("order", rows_in, stage.rows_out, {self._config.duplicates: duplicates})
        return list(shards.values()), catalogue

    def _encode(self, shards: list[_Shard], catalogue: pl.DataFrame) -> tuple[pl.Series, Ints]:
        """All items, rising (an item's place there is its code), and rows of each [I]; shards get their codes."""
        with self._stages.stage("encode", rows_in=self._ledger[-1].rows_out, steps=len(shards)) as stage:
            shared = ray.put(_arrow(catalogue.select("item_id")))
            encode = ray.remote(tasks.encode)

            def start(number: int) -> ray.ObjectRef:
                shard = shards[number]
                shard.codes, shard.items = encode.remote(shard.items, shared), None
                return shard.codes

            for _ in run(start, len(shards), "encode"):
                stage.advance(0)
            stage.advance(stage.rows_in, steps=0)
        return catalogue["item_id"], catalogue["count"].to_numpy().copy()

    def _k_core(self, shards: list[_Shard], item_ids: pl.Series, counts: Ints) -> Items:
        """Lets users and items die until the core is left; shards know their living users, the result the items."""
        config, rows_in = self._config, self._ledger[-1].rows_out
        exempt = None
        if self._parent is not None:
            exempt = item_ids.is_in(self._parent.items["item_id"].implode()).to_numpy()
            known = ray.remote(tasks.known_users)
            for shard in shards:
                if (old := self._parent.files.get(shard.number)) is not None:
                    shard.exempt = known.remote(shard.users, old)
        items = Items(counts, config.min_item_interactions, exempt)
        bury = ray.remote(tasks.bury).options(num_returns=2)

        def start(flags: ray.ObjectRef, number: int) -> ray.ObjectRef:
            shard = shards[number]
            of = (shard.item, shard.users, shard.codes, shard.alive)
            removed, shard.alive = bury.remote(*of, flags, config.min_user_interactions, shard.exempt)
            return removed

        short = 0
        with self._stages.stage("k-core", rows_in=rows_in) as stage:
            for number in itertools.count(1):
                buried = items.bury()
                flags = ray.put(items.alive)
                users = 0
                for _, removed in run(partial(start, flags), len(shards), "k-core"):
                    items.subtract(removed)
                    users, short = users + removed.users, short + removed.rows
                left = int(items.counts[items.alive].sum())
                stage.note(f"round {number}: {left:,} rows left, {users:,} users and {buried:,} items dropped")
                if not users:
                    break
            stage.advance(left)
        self._tell("k-core", rows_in, left, {"user_too_short": short, "item_too_rare": rows_in - left - short})
        if not left and self._parent is None:
            raise GenattError(
                f"no rows left of {rows_in}: no users with {config.min_user_interactions} rows on items with "
                f"{config.min_item_interactions}: lower min_user_interactions or min_item_interactions"
            )
        return items

    def _write(self, shards: list[_Shard], lives: Flags, words: Vocabulary) -> list[tasks.Written]:
        """Writes the files of all shards; returns what they are, by number."""
        config, parent = self._config, self._parent
        dense_of_code, flags = ray.put(words.dense_of_code), ray.put(lives)
        write = ray.remote(tasks.write)
        rows_in = self._ledger[-1].rows_out

        def start(number: int) -> ray.ObjectRef:
            shard = shards[number]
            arguments = (shard.item, shard.columns, shard.users, shard.codes, shard.alive, dense_of_code, flags)
            old = None if parent is None else parent.files.get(shard.number)
            rest = (self._directory, config, words.out_of_vocabulary, old, shard.exempt)
            shard.item = shard.columns = None
            return write.remote(shard.number, *arguments, *rest)

        written: list[tasks.Written | None] = [None] * len(shards)
        dropped: Dropped = {}
        with self._stages.stage("write", rows_in=rows_in, steps=len(shards)) as stage:
            for number, one in run(start, len(shards), "write"):
                written[number] = one
                for reason, rows in one.dropped.items():
                    dropped[reason] = dropped.get(reason, 0) + rows
                if one.file is not None:
                    stage.advance(one.file.interactions)
        added = 0 if parent is None else parent.manifest.num_interactions
        self._tell("write", rows_in, stage.rows_out, dropped, added)
        return [one for one in written if one is not None]

    def _manifest(self, written: list[tasks.Written], catalogue: pl.Series, words: Vocabulary) -> Manifest:
        """Writes the vocabulary, its counts as the shards have made them, and checks them against the shards."""
        parent, config = self._parent, self._config
        train = np.zeros(words.size + 1, np.int64)
        trained, hidden = sum(one.trained for one in written), 0
        if parent is not None:
            train[: len(parent.train_counts)] = parent.train_counts
            trained += int(parent.train_counts.sum())
            hidden = int(parent.items["count"].sum()) - parent.manifest.num_interactions  # beyond max_history
            again, lost = Tally.joined([one.again for one in written]), Tally.joined([one.lost for one in written])
            words = words.without(catalogue, again, lost)
        for one in written:
            np.add.at(train, one.train.ids, one.train.counts)
        entry = self._ledger[-1]
        check_counts(words, train, entry.rows_out + entry.dropped.get("beyond_max_history", 0) + hidden, trained)
        self.notes += split_notes(config.split, written, trained)
        files = [one.file for one in written if one.file is not None]
        buckets = None if words.buckets is None else self._save(BUCKETS, _arrow(words.buckets))
        try:
            return Manifest(
                name=self._source.name,
                num_users=sum(file.users for file in files),
                num_items=words.size,
                num_interactions=sum(file.interactions for file in files),
                num_shards=self._num_shards,
                row_group_size=config.row_group_size,
                split=config.split,
                time_unit=self._plan.time_unit,
                out_of_vocabulary=words.out_of_vocabulary,
                files=tuple(files),
                vocabulary=self._save(VOCABULARY, self._with_attributes(vocabulary.finish(words.table, train))),
                buckets=buckets,
                source=tuple(RawFile(path=file.label, bytes=file.bytes) for file in self._source.files),
                config=config.recorded(),
                config_hash=config.hash(),
                pruned_files=self._plan.pruned_files,
                parent=None if parent is None else parent.hash,
                ancestors=() if parent is None else parent.ancestors,
                ledger=tuple(self._ledger),
            )
        except ValidationError as error:
            raise _defect(error) from error

    def _with_attributes(self, table: pa.Table) -> pa.Table:
        if self._parent is not None:
            table = self._parent.with_attributes(table)
        if self._source.items is None:
            return table
        attributes = read_table(self._source.items, text=self._config.item_column)
        return vocabulary.join_attributes(table, attributes, self._config.item_column, self._source.items.label)

    def _save(self, path: str, table: pa.Table) -> WrittenFile:
        content = parquet_bytes(table, row_group_size=VOCABULARY_ROW_GROUP)
        write_bytes(f"{self._directory}/{path}", content)
        return WrittenFile(path=path, bytes=len(content), sha256=hashlib.sha256(content).hexdigest())

    def _tell(self, stage: str, rows_in: int, rows_out: int, dropped: Dropped, added: int = 0) -> None:
        """Enters a stage into the ledger, which refuses sums that do not add up."""
        reasons = {reason: rows for reason, rows in dropped.items() if rows}
        try:
            entry = LedgerEntry(stage=stage, rows_in=rows_in, rows_out=rows_out, dropped=reasons, added=added)
        except ValidationError as error:
            raise _defect(error) from error
        self._ledger.append(entry)


def _defect(error: ValidationError) -> GenattError:
    return defect(one_line(error.errors()[0]["ctx"]["error"]))


def _grouped(
    blocks: Iterator[tuple[ray.ObjectRef, int, int]], least: int, stage: Stage
) -> Iterator[list[ray.ObjectRef]]:
    """Neighbouring blocks with `least` bytes together; tells `stage` of each."""
    group: list[ray.ObjectRef] = []
    held = 0
    for ref, rows, size in blocks:
        stage.advance(rows, bytes=size)
        group.append(ref)
        held += size
        if held >= least:
            yield group
            group, held = [], 0
    if group:
        yield group


def _arrow(frame: pl.DataFrame) -> pa.Table:
    return frame.to_arrow(compat_level=pl.CompatLevel.oldest())
