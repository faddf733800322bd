"""Adding rows to a prepared data set: what the new version takes over from its parent, and how far that may be off.

The parent's directory is read, never changed, and none of its raw rows are read again. Its users, items and dense ids
stay; new items get the ids that follow. Shards without new rows are copied as they are, the others are read, merged and
written anew. New rows come after old ones of the same time; without a time column, after all of the user's.

**Admission is frozen.** Known users and items always count; others need the k-core's rows among the new ones. Of the
rows there are, that loses none: a core stays one when rows are added, and who is unknown has no rows in the parent; so
what is admitted is exactly what the k-core of the parent's rows and the new ones together would add (`min_count` and
`max_history` aside). What is lost are rows that were dropped before: a user or item that the parent dropped is unknown,
and its old rows do not help it in. `Parent.drift` says how many rows that can concern at most.

**Duplicates** of old rows are found by user, dense id and time, and never among old rows: `exact` drops new rows that
are there already, so that rows appended twice count once; otherwise appending twice is not noticed. `consecutive`
drops the second of an old and a new row in direct succession. It differs from preparing all rows at once where a row
between two equal ones was rejected, or comes late, when the second is gone already. Either way items that share a dense
id, in a hash bucket or as rare ones, count as one. With `max_history`, old rows beyond it are not known any more, so a
new row that repeats one of them is no duplicate.

**Splits.** Instants of a time split stay, also where they were given as dates. Users drawn at random stay what they
are, for only their id decides. With leave-one-out the targets move on: the old ones become history as soon as a user
has new rows, so results on two versions are not about the same targets.

**Attributes.** An item keeps its parent's; where the new rows' items file has a value for it, that value wins. Items
and columns that only one of the two has are null in the rest.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import BaseModel, ValidationError

from data_pipeline import format as shards
from data_pipeline.config import PrepareConfig
from data_pipeline.errors import GenattError
from data_pipeline.format import Manifest, ShardFile, WrittenFile
from data_pipeline.k_core import Codes, Flags, Ints, starts
from data_pipeline.order import by_key, by_user_and_time
from data_pipeline.readers import Plan, in_unit
from data_pipeline.sequences import Sequences
from data_pipeline.splits import TimePoint
from data_pipeline.storage import check_access, copy, explaining, filesystem, one_line, opened, redact

# What makes a version's content, and so cannot differ between versions.
INHERITED = (
    "event_weights", "duplicates", "min_user_interactions", "min_item_interactions", "min_count", "out_of_vocabulary",
    "hash_buckets", "max_history", "split", "row_group_size", "seed",
)  # fmt: skip
# What the new rows are probably written like; they may differ.
LIKELY = ("user_column", "item_column", "time_column", "time_unit", "event_column", "id_type")
REJECTED = ("user_too_short", "item_too_rare", "below_min_count")  # the ledger's reasons that admission has
ANEW = "prepare everything anew"


@dataclass(frozen=True)
class Parent:
    """A prepared directory that rows are added to."""

    path: str
    manifest: Manifest
    hash: str

    @staticmethod
    def load(path: str) -> "Parent":
        """The data set at `path`, with all of its files there and of the right size.

        Their content is checked where it is read; that of shards merely copied, by whoever checks the new version.

        Raises
        ------
        GenattError
            None is there, it is damaged, or it has another schema version.
        """
        check_access(path)
        manifest = shards.load_manifest(path)
        fs, root = filesystem(path)
        with explaining(path, "read"):
            found = {name: info["size"] for name, info in fs.find(root, detail=True).items()}
        for file in manifest.written:
            size = found.get(f"{root.rstrip('/')}/{file.path}")
            if size != file.bytes:
                said = "is missing" if size is None else f"is damaged: {size} bytes instead of {file.bytes}"
                raise GenattError(f"{redact(path)}/{file.path} {said}: append to an intact copy, or {ANEW}")
        return Parent(path, manifest, shards.manifest_hash(path))

    @property
    def ancestors(self) -> tuple[str, ...]:
        """What a version made of this one comes from, oldest first."""
        older = self.manifest.ancestors or tuple(filter(None, [self.manifest.parent]))
        return (*older, self.hash)

    def inherited(self, config: PrepareConfig) -> PrepareConfig:
        """`config` with the parent's choices.

        Raises
        ------
        GenattError
            An option was set to something else.
        """
        try:
            ours = PrepareConfig.model_validate(self.manifest.config | {"source": "-", "out": "-"})
        except ValidationError as error:
            raise GenattError(
                f"{redact(self.path)}: its options are not understood: {one_line(error)}: {ANEW}"
            ) from error
        theirs: dict[str, Any] = {name: getattr(ours, name) for name in INHERITED}
        theirs |= {"split": self.manifest.split, "num_shards": self.manifest.num_shards}
        for name, value in theirs.items():
            given = self._resolved(config.split) if name == "split" else getattr(config, name)
            if name in config.model_fields_set and given != value:
                raise GenattError(
                    f"{name}={_text(given)} but {redact(self.path)} was prepared with {name}={_text(value)}: "
                    f"leave it out, or {ANEW}"
                )
        theirs |= {name: getattr(ours, name) for name in LIKELY if name not in config.model_fields_set}
        update = config.model_dump() | theirs | {"name": config.name or self.manifest.name}
        try:
            return PrepareConfig.model_validate(update)
        except ValidationError as error:  # the parent's options and those given cannot go together
            raise GenattError(
                f"cannot append to {redact(self.path)}: {' '.join(error.errors()[0]['msg'].split())}"
            ) from error

    def _resolved(self, split: Any) -> Any:
        if not isinstance(split, TimePoint):
            return split
        return split.resolved(lambda time: in_unit(time, self.manifest.time_unit or "none", "split"))

    def matched(self, planned: Plan) -> Plan:
        """`planned` so that ids are read as the parent has them: numbers as text where it has text.

        Raises
        ------
        GenattError
            Text where the parent has numbers, or times in another unit.
        """
        ours = self.manifest.time_unit or "none"
        if planned.time_unit != ours:
            raise GenattError(
                f"the new rows have {_unit(planned.time_unit)} but {redact(self.path)} has {_unit(ours)}: "
                "write them alike, or set time_unit if they are"
            )
        kinds = planned.kinds
        for role, type_ in (("user", self._user_type), ("item", self.vocabulary.schema.field("item_id").type)):
            kind = "int64" if pa.types.is_integer(type_) else "string"
            if kind == "int64" and getattr(kinds, role) == "string":
                raise GenattError(
                    f"{role} ids are text in the new rows but integers in {redact(self.path)}: "
                    f"write integers, or {ANEW} with id_type=string"
                )
            kinds = replace(kinds, **{role: kind})
        return replace(planned, kinds=kinds)

    @cached_property
    def vocabulary(self) -> pa.Table:
        """item_id, dense_id, count, train_count and attributes of the parent's items."""
        return _read(self.path, self.manifest.vocabulary)

    @cached_property
    def items(self) -> pl.DataFrame:
        """item_id, dense_id and count of all items the parent knows; a null item_id stands for all rare ones."""
        table = self.vocabulary if self.manifest.buckets is None else _read(self.path, self.manifest.buckets)
        return pl.DataFrame(table.select(["item_id", "dense_id", "count"]))

    @cached_property
    def train_counts(self) -> Ints:
        """How often each item trains: int64 [V + 1], by dense id."""
        return np.concatenate([[0], self.vocabulary["train_count"].to_numpy()])

    @cached_property
    def files(self) -> "dict[int, OldShard]":
        """By number; one that no user hashes to is not there."""
        return {file.shard: OldShard(self.path, file) for file in self.manifest.files}

    @property
    def _user_type(self) -> pa.DataType:
        path = f"{self.path}/{self.manifest.files[0].path}"
        with opened(path) as stream, explaining(path, "read"):
            return pq.read_schema(stream).field("user_id").type

    def with_attributes(self, vocabulary: pa.Table) -> pa.Table:
        """`vocabulary` with the attributes that the parent has of its items."""
        rows = pc.index_in(vocabulary["item_id"], value_set=self.vocabulary["item_id"], skip_nulls=True)
        for name in self.vocabulary.column_names:
            if name not in vocabulary.column_names:
                vocabulary = vocabulary.append_column(name, self.vocabulary[name].take(rows))
        return vocabulary

    def drift(self, manifest: Manifest, items: Ints, dense_ids: Codes, rejected_users: int) -> dict[str, int]:
        """What frozen admission meant, for `manifest.drift`.

        new_users, new_items
            In the new version, and not in its parent.
        rejected_users, rejected_items
            Of the new rows, neither known nor admitted. An item is admitted if it gets an id; one that shares the id
            of rare items is not counted as new.
        rows_of_rejected_items
            New rows, duplicates aside, on these items.
        rejected_rows
            New rows that admission dropped: the k-core's, and those of items below min_count.
        rejected_rows_before
            The same of all versions before, the first included. Preparing all raw rows at once, without min_count and
            max_history, would hold all rows of this version and at most these two numbers more.

        Parameters
        ----------
        items
            New rows of each item that the parent does not know [I], duplicates aside.
        dense_ids
            The id each has got [I], 0 where it was rejected.
        """
        before = self.manifest
        return {
            "new_users": manifest.num_users - before.num_users,
            "new_items": int(((dense_ids > 0) & (dense_ids != (manifest.out_of_vocabulary or 0))).sum()),
            "rejected_users": rejected_users,
            "rejected_items": int((dense_ids == 0).sum()),
            "rows_of_rejected_items": int(items[dense_ids == 0].sum()),
            "rejected_rows": _rejected_rows(manifest),
            "rejected_rows_before": _rejected_rows(before) + (before.drift or {}).get("rejected_rows_before", 0),
        }


@dataclass(frozen=True)
class OldShard:
    """A shard of the parent, for the tasks that need it; `GenattError` where a file is not what the manifest says."""

    path: str
    file: ShardFile

    def has(self, users: pa.Array) -> Flags:
        """Which of `users` have a sequence here."""
        name = f"{self.path}/{self.file.path}"
        with opened(name) as stream, explaining(name, "read"):
            known = pq.read_table(stream, columns=["user_id"], page_checksum_verification=True)["user_id"]
        flags: Flags = pc.is_in(users.cast(known.type), value_set=known).to_numpy(zero_copy_only=False)
        return flags

    def read(self) -> tuple[pa.Table, pa.Table]:
        """Its rows and its index."""
        return _read(self.path, self.file), _read(self.path, self.file.index)

    def copied(self, directory: str) -> ShardFile:
        """The same in another `directory`, by its bytes."""
        for file in (self.file, self.file.index):
            copy(f"{self.path}/{file.path}", f"{directory}/{file.path}")
        return self.file


def merged(old: Sequences, new: Sequences, config: PrepareConfig) -> tuple[Sequences, Flags, Codes]:
    """Two versions' sequences of one shard as one; which new rows were dropped as duplicates; dense ids of old ones.

    Users lie in the order of all shards, their rows by time, old before new. Without a time column, the places of new
    rows follow the old ones'. Only `consecutive` drops old rows: after a new one that came late.
    """
    ids = pa.concat_arrays([old.users, new.users.cast(old.users.type)]).dictionary_encode()
    ordered, place = by_key(ids.dictionary, config.seed)
    user_of_sequence = place[ids.indices.to_numpy()]
    count = len(old.lengths)
    user = np.repeat(user_of_sequence, np.concatenate([old.lengths, new.lengths]))
    items = np.concatenate([old.items, new.items])
    times = np.concatenate([old.times, new.times])
    fresh = np.repeat([False, True], [len(old.items), len(new.items)])
    if config.time_column is None:
        follows = np.zeros(len(place), np.int64)
        follows[user_of_sequence[:count]] = old.times[starts(old.lengths) + old.lengths - 1] + 1
        times[fresh] += follows[user[fresh]]

    rows = by_user_and_time(user, times)
    user, items, times, fresh = user[rows], items[rows], times[rows], fresh[rows]
    again = _again(user, items, times, fresh, config)
    if config.time_column is None:  # all new rows follow: where one is dropped, it is the first
        times[fresh] -= np.bincount(user[again], minlength=len(place))[user[fresh]]
    kept = ~again
    dropped, count_old = np.empty(len(rows), np.bool_), len(old.items)
    dropped[rows] = again
    weights = None
    if old.weights is not None and new.weights is not None:
        weights = np.concatenate([old.weights, new.weights])[rows][kept]
    return (
        Sequences(
            users=ordered["user_id"].to_arrow(compat_level=pl.CompatLevel.oldest()).cast(old.users.type),
            lengths=np.bincount(user[kept], minlength=len(place)),
            items=items[kept],
            times=times[kept],
            weights=weights,
        ),
        dropped[count_old:],
        old.items[dropped[:count_old]],
    )


def _again(user: Ints, items: np.ndarray[Any, Any], times: Ints, fresh: Flags, config: PrepareConfig) -> Flags:
    """Which rows, in their final order, repeat one of the other version. [N] each; fresh: of the new version."""
    if config.duplicates == "exact":
        known = (~pl.col("fresh")).any().over("user", "item", "time")
        rows = pl.DataFrame({"user": user, "item": items, "time": times, "fresh": fresh})
        exact: Flags = rows.select(pl.col("fresh") & known).to_series().to_numpy()
        return exact
    again = np.zeros(len(user), np.bool_)
    if config.duplicates == "consecutive":
        again[1:] = (user[1:] == user[:-1]) & (items[1:] == items[:-1]) & (fresh[1:] != fresh[:-1])
    return again


def drift_text(drift: Mapping[str, int]) -> str:
    """`drift` in one line for people, without zeros."""
    return ", ".join(f"{value:,} {name.replace('_', ' ')}" for name, value in drift.items() if value) or "nothing new"


def sequences_of(table: pa.Table) -> Sequences:
    """The rows of a shard file as flat arrays."""
    lists = table["item_ids"].combine_chunks()
    weights = table["weights"].combine_chunks().flatten().to_numpy() if "weights" in table.column_names else None
    return Sequences(
        users=table["user_id"].combine_chunks(),
        lengths=pc.list_value_length(lists).to_numpy().astype(np.int64),
        items=lists.flatten().to_numpy(),
        times=table["timestamps"].combine_chunks().flatten().to_numpy(),
        weights=weights,
    )


def _read(path: str, file: WrittenFile) -> pa.Table:
    return pq.read_table(pa.BufferReader(shards.read_intact(path, file)))


def _rejected_rows(manifest: Manifest) -> int:
    return sum(rows for entry in manifest.ledger for reason, rows in entry.dropped.items() if reason in REJECTED)


def _unit(unit: str) -> str:
    told = {"row": "no time column", "none": "times that tell no unit", "day": "dates"}
    return told.get(unit, f"times in {unit}")


def _text(value: Any) -> str:
    return " ".join(str(value.model_dump() if isinstance(value, BaseModel) else value).split())
