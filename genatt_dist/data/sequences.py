"""The sequence shards as training, evaluation and serving see them: what planning needs is in memory, items are read.

Legend: U users, T interactions, G row groups of all shards. User u's items have the places offsets[u] …
offsets[u + 1] - 1 among all T, oldest first, in the order of the shards.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from data_pipeline import format as shards
from data_pipeline.errors import GenattError
from data_pipeline.storage import check_access, redact
from genatt_dist.config import PREFETCH_BYTES
from genatt_dist.data.arrays import Events, Ints, Items
from genatt_dist.data.features import FeatureReader
from genatt_dist.data.row_groups import READERS, RowGroups, Shards
from genatt_dist.embedding.feature_options import Feature

T = TypeVar("T")


@dataclass(frozen=True)
class Sequences:
    """All users: how long their histories are, what of them trains and what is held out, and where the items lie.

    offsets: int64 [U + 1]. train: int32 [U], the first so many items train. valid, test: int32 [U], the place of the
    target in the user's sequence, -1 = none. first_user_G: int64 [G + 1]. popularity: int64 [num_items + 1],
    interactions of each item in the training part (index = dense id). Nothing grows with T but what `groups` keeps.
    features: what positions read besides their item's row.
    """

    offsets: Ints
    train: Items
    valid: Items
    test: Items
    first_user_G: Ints
    groups: RowGroups
    popularity: Ints
    manifest: shards.Manifest
    manifest_hash: str
    path: str
    features: FeatureReader = field(default_factory=FeatureReader)

    @staticmethod
    def read(
        path: str, verify: bool = False, prefetch_bytes: int = PREFETCH_BYTES, features: Sequence[Feature] = ()
    ) -> Sequences:
        """What `genatt prepare` published at `path`: manifest, indices, counts and attributes; no shard yet.

        features: of the model (`RunConfig.features`); times are read only where one of them asks for it.

        verify: check the sha256 of every file first; of shards that are larger together than `prefetch_bytes` not, for
        that would read them all: damage in them is found by page checksums when it is read.
        Raises GenattError naming the file: missing, damaged, an index that contradicts the manifest; or the feature
        that the data set does not have.
        """
        check_access(path)
        manifest = shards.load_manifest(path)
        reader = FeatureReader.of(features, path, manifest)
        if verify and sum(file.bytes for file in manifest.files) <= prefetch_bytes:
            shards.verify(path, manifest)
        with ThreadPoolExecutor(READERS, "indices") as pool:
            tables = list(pool.map(lambda file: _index(path, file), manifest.files))
        length, train, valid, test = (
            np.concatenate([np.zeros(0, np.int32), *(table[name].to_numpy() for table in tables)])
            for name in shards.INDEX_SCHEMA.names
        )
        offsets = from_zero(length)
        users, size = [file.users for file in manifest.files], manifest.row_group_size
        number = [-(-count // size) for count in users]
        shard_G = np.repeat(np.arange(len(users)), number)
        number_G = np.arange(len(shard_G)) - np.repeat(from_zero(number)[:-1], number)
        first_user_G = np.append(from_zero(users)[shard_G] + number_G * size, len(length))
        first_item_G, with_times = offsets[first_user_G], bool(reader.contexts)
        groups = RowGroups.of(path, manifest, shard_G, number_G, first_item_G, prefetch_bytes, with_times)
        words = shards.read_vocabulary(path, manifest, columns=["dense_id", "train_count"])
        popularity = np.zeros(manifest.num_items + 1, np.int64)
        popularity[words["dense_id"].to_numpy()] = words["train_count"].to_numpy()
        hashed = shards.manifest_hash(path)
        return Sequences(offsets, train, valid, test, first_user_G, groups, popularity, manifest, hashed, path, reader)

    @staticmethod
    def of(
        items: Events,
        length: npt.ArrayLike,
        places: npt.ArrayLike,
        manifest: shards.Manifest,
        row_group_size: int | None = None,
        features: FeatureReader | None = None,
    ) -> Sequences:
        """Sequences that are in memory: `items` of users of these lengths; places: train, valid and test [3, U]."""
        offsets = from_zero(length)
        train, valid, test = np.asarray(places, np.int32)
        first_user_G = np.append(np.arange(0, len(train), row_group_size or len(train)), len(train))
        first_item_G = offsets[first_user_G]
        groups = RowGroups(
            lambda group: items[first_item_G[group] : first_item_G[group + 1]], first_item_G, items.nbytes, items.dtype
        )
        nothing = np.zeros(manifest.num_items + 1, np.int64)
        reader = features or FeatureReader()
        return Sequences(offsets, train, valid, test, first_user_G, groups, nothing, manifest, "", "", reader)

    @property
    def num_users(self) -> int:
        return len(self.offsets) - 1

    @property
    def num_items(self) -> int:
        return self.manifest.num_items

    @property
    def lengths(self) -> Ints:
        """Interactions of each user: int64 [U]."""
        return np.diff(self.offsets)

    @cached_property
    def user_ids(self) -> pa.Array:
        """Original ids [U], read from the shards when first asked for."""
        source = Shards(self.path, self.manifest.files)

        def column(shard: int) -> pa.ChunkedArray:
            number = -(-self.manifest.files[shard].users // self.manifest.row_group_size)
            return source.column(shard, range(number), "user_id")

        with ThreadPoolExecutor(READERS, "user ids") as pool:
            columns = pool.map(column, range(len(self.manifest.files)))
            return pa.chunked_array([chunk for one in columns for chunk in one.chunks]).combine_chunks()

    def has_target(self, split: str) -> npt.NDArray[np.bool_]:
        """Which users have a target in `valid` or `test`: bool [U]."""
        return self._place(split) >= 0

    def history_end(self, split: str) -> Ints:
        """Where each user's history ends for `train`, `valid` or `test`: int64 [U], a place among all items.

        The target of `valid` or `test` is the item there. Users without one have all their items as history.
        """
        place = self._place(split)
        return self.offsets[:-1] + np.where(place >= 0, place, self.lengths)

    def _place(self, split: str) -> Items:
        return {"train": self.train, "valid": self.valid, "test": self.test}[split]

    def take(self, starts: Ints, lengths: Ints) -> tuple[Events, Ints]:
        """Slices of users' items: places starts[i] … starts[i] + lengths[i] - 1, each inside one user.

        Returns (items, first): slice i is items[first[i] : first[i] + lengths[i]]. They are `Items`, with their times
        where a feature needs these. Only the row groups they lie in are read.
        """
        if not len(starts):
            return np.zeros(0, self.groups.dtype), np.zeros(0, np.int64)
        ((_, items, first),) = self.slices([(None, starts, lengths)], ahead=1)
        return items, first

    def slices(
        self, wanted: Iterable[tuple[T, Ints, Ints]], ahead: int
    ) -> Generator[tuple[T, Events, Ints], None, None]:
        """`take` of many, each (name, starts, lengths) with at least one slice: (name, items, first), in that order.

        The row groups of the next ones are read in the background. `wanted` is asked for at most `ahead` of those that
        have been given, so that making it costs no long wait at the beginning.
        """
        asked = given = 0

        def order() -> Generator[tuple[tuple[_Taken[T], int], int] | None, None, None]:
            nonlocal asked
            rest = iter(wanted)
            while True:
                while asked - given >= ahead:
                    yield None
                if (one := next(rest, None)) is None:
                    return
                asked += 1
                taken = _Taken(*one, self.groups.first_item_G)
                for turn, group in enumerate(taken.groups.tolist()):
                    yield (taken, turn), group

        stream = self.groups.along(order())
        try:
            for (taken, turn), items in stream:
                taken.add(turn, items)
                if turn == len(taken.groups) - 1:
                    given += 1
                    assert taken.items is not None
                    yield taken.name, taken.items, taken.first
        finally:
            stream.close()


class _Taken(Generic[T]):
    """Slices on their way: which row groups they lie in, and their items as far as those have come."""

    def __init__(self, name: T, starts: Ints, lengths: Ints, first_item_G: Ints) -> None:
        self.name = name
        group = np.searchsorted(first_item_G[:-1], starts, side="right") - 1
        self._order = np.argsort(group, kind="stable")
        self.groups, begin = np.unique(group[self._order], return_index=True)
        self._begin = np.append(begin, len(group))
        self._starts, self._lengths = (starts - first_item_G[group])[self._order], lengths[self._order]
        self._end = from_zero(self._lengths)
        self.items: Events | None = None

    @property
    def first(self) -> Ints:
        """Where each slice begins in `items`."""
        first = np.empty(len(self._order), np.int64)
        first[self._order] = self._end[:-1]
        return first

    def add(self, turn: int, items: Events) -> None:
        """Copy what lies in the row group `groups[turn]`."""
        if self.items is None:
            self.items = np.empty(int(self._end[-1]), items.dtype)
        low, high = self._begin[turn], self._begin[turn + 1]
        part = gather(items, self._starts[low:high], self._lengths[low:high])
        self.items[self._end[low] : self._end[high]] = part


def gather(items: Events, starts: Ints, lengths: Ints) -> Events:
    """Concatenate items[starts[i] : starts[i] + lengths[i]] for all i."""
    ends = np.cumsum(lengths)
    within = np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - lengths, lengths)
    return items.take(np.repeat(starts, lengths) + within)


def from_zero(counts: npt.ArrayLike) -> Ints:
    """0 and the running sums: int64, one longer than `counts`."""
    return np.concatenate(([0], np.cumsum(counts, dtype=np.int64)))


def _index(path: str, file: shards.ShardFile) -> pa.Table:
    """The index of a shard, if it says of it what the manifest says."""
    table = shards.read_index(path, file)
    length, train, valid, test = (table[name].to_numpy() for name in shards.INDEX_SCHEMA.names)
    inside = (train >= 0) & (train <= length) & (length >= 1)
    inside &= (valid >= -1) & (valid < length) & (test >= -1) & (test < length)
    if len(length) != file.users or int(length.sum()) != file.interactions or not inside.all():
        raise GenattError(
            f"{redact(path)}/{file.index.path} is damaged: {len(length)} users with {int(length.sum())} interactions, "
            f"the manifest says {file.users} with {file.interactions}, or a place outside a sequence: {shards.MEND}"
        )
    return table
