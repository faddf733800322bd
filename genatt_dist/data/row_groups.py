"""Row groups of the shards, read when they are needed, ahead of it where the order is known, in bounded memory.

Only the bytes of the columns and row groups asked for are read, each Parquet footer once; page checksums find damage.

Legend: G row groups of all shards, in the order of the manifest; a row group's items lie one user after the other.
"""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as LateError
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.errors import GenattError
from data_pipeline.format import MEND, Manifest, ShardFile
from data_pipeline.readers.access import Parts
from data_pipeline.storage import read_ranges, redact
from genatt_dist.data.ahead import LIMIT_SECONDS
from genatt_dist.data.arrays import EVENT, ITEM, Events, Ints, Items, timed
from genatt_dist.data.context import seconds

T = TypeVar("T")

READERS = 8  # row groups on their way at a time: what hides the latency of an object store
_TAIL = 1 << 16  # bytes read from a shard's end, where its footer lies; a longer one takes a second read


class Shards:
    """Columns of the row groups of a prepared directory."""

    def __init__(self, path: str, files: Sequence[ShardFile]) -> None:
        self._path, self._files = path, files
        self._footers: dict[int, pq.FileMetaData] = {}
        self._locks = [threading.Lock() for _ in files]

    def column(self, shard: int, row_groups: Sequence[int], name: str) -> pa.ChunkedArray:
        """Column `name` of some row groups (rising) of the shard with this index in the manifest.

        Raises GenattError naming file and row groups: unreadable, damaged.
        """
        return self.columns(shard, row_groups, [name])[name]

    def columns(self, shard: int, row_groups: Sequence[int], names: Sequence[str]) -> pa.Table:
        """`column` of several at once."""
        file = self._files[shard]
        try:
            footer = self._footer(shard)
            ranges = [_chunk(footer.row_group(group), name) for group in row_groups for name in names]
            parts = read_ranges(f"{self._path}/{file.path}", ranges)
            sparse = pa.PythonFile(Parts(file.bytes, ranges, parts), mode="r")
            reader = pq.ParquetFile(sparse, metadata=footer, page_checksum_verification=True, pre_buffer=False)
            return reader.read_row_groups(list(row_groups), columns=list(names), use_threads=False)
        except (OSError, IndexError, KeyError, pa.ArrowException) as error:
            several = f"row group{'s' if len(row_groups) > 1 else ''} {', '.join(map(str, row_groups[:3]))}"
            raise GenattError(
                f"{redact(self._path)}/{file.path} is damaged: cannot read {' and '.join(names)} of {several}: "
                f"{' '.join(str(error).split())}: {MEND}"
            ) from error

    def _footer(self, shard: int) -> pq.FileMetaData:
        with self._locks[shard]:
            if shard not in self._footers:
                file = self._files[shard]
                url, size = f"{self._path}/{file.path}", file.bytes
                (tail,) = read_ranges(url, [(max(0, size - _TAIL), size)])
                length = int.from_bytes(tail[-8:-4], "little") + 8
                if len(tail) < length <= size:
                    (tail,) = read_ranges(url, [(size - length, size)])
                self._footers[shard] = pq.ParquetFile(pa.BufferReader(tail)).metadata
            return self._footers[shard]


def _chunk(row_group: pq.RowGroupMetaData, name: str) -> tuple[int, int]:
    """The bytes [start, stop) of a column, by the name of its top field."""
    for index in range(row_group.num_columns):
        column = row_group.column(index)
        if column.path_in_schema.split(".")[0] == name:
            start = column.data_page_offset
            if column.has_dictionary_page:
                start = min(start, column.dictionary_page_offset)
            return start, start + column.total_compressed_size
    raise KeyError(f"it has no column {name}")


class RowGroups:
    """Items of row groups: those used last are kept, as many as `capacity` bytes hold.

    A data set that fits is read once. While `along` runs, up to `capacity` bytes more may be on their way.
    """

    def __init__(
        self,
        read: Callable[[int], Events],
        first_item_G: Ints,
        capacity: int,
        dtype: np.dtype[Any] = ITEM,
    ) -> None:
        """read: the items of a row group, safe to call from several threads. first_item_G: [G + 1], the place of each
        row group's first item among all items. dtype: of items, int32, or EVENT with the time of each.
        """
        self._read, self.first_item_G, self.capacity, self.dtype = read, first_item_G, capacity, dtype
        self._kept: OrderedDict[int, Events] = OrderedDict()
        self._held = 0
        self._lock = threading.Lock()

    @staticmethod
    def of(
        path: str,
        manifest: Manifest,
        shard_G: Ints,
        number_G: Ints,
        first_item_G: Ints,
        capacity: int,
        with_times: bool,
    ) -> RowGroups:
        """Those of the shards at `path`. shard_G, number_G: each row group's shard, and its number in the shard.

        with_times: read the time of each item too.
        """
        shards = Shards(path, manifest.files)
        names = ["item_ids", "timestamps"] if with_times else ["item_ids"]

        def read(group: int) -> Events:
            shard, number = int(shard_G[group]), int(number_G[group])
            table = shards.columns(shard, [number], names)
            items: Items = flat(table["item_ids"])
            where = f"{redact(path)}/{manifest.files[shard].path} row group {number}"
            expected = int(first_item_G[group + 1] - first_item_G[group])
            if len(items) != expected:
                raise GenattError(
                    f"{where} is damaged: it holds {len(items)} interactions, its index says {expected}: {MEND}"
                )
            if len(items) and not 1 <= int(items.min()) <= int(items.max()) <= manifest.num_items:
                raise GenattError(
                    f"{where}: item ids span {items.min()}..{items.max()}, not 1..{manifest.num_items}: {MEND}"
                )
            if not with_times:
                return items
            times = flat(table["timestamps"])
            if len(times) != expected:
                raise GenattError(f"{where} is damaged: {expected} interactions have {len(times)} times: {MEND}")
            return timed(items, seconds(times, manifest.time_unit, where))

        return RowGroups(read, first_item_G, capacity, EVENT if with_times else ITEM)

    def __getitem__(self, group: int) -> Events:
        """The items of one row group: int32."""
        if (items := self._cached(group)) is not None:
            return items
        items = self._read(group)
        with self._lock:
            if group not in self._kept:
                self._kept[group] = items
                self._held += items.nbytes
            while self._held > self.capacity:
                self._held -= self._kept.popitem(last=False)[1].nbytes
        return items

    def along(self, order: Iterable[tuple[T, int] | None]) -> Generator[tuple[T, Events], None, None]:
        """The items of row groups in `order` (anything, row group), which is asked for as far ahead as `capacity`
        bytes reach; None in it: nothing more until those asked for so far have come closer. Errors of reading are
        raised here.
        """
        pool: ThreadPoolExecutor | None = None
        coming: deque[tuple[T, int, Future[Events] | Events]] = deque()
        coming_bytes, rest = 0, iter(order)
        try:
            while True:
                while coming_bytes < self.capacity or not coming:
                    if (wanted := next(rest, None)) is None:  # the end, or a pause
                        break
                    name, group = wanted
                    found: Future[Events] | Events | None = self._cached(group)
                    if found is None:
                        pool = pool or ThreadPoolExecutor(READERS, "row groups")
                        found = pool.submit(self.__getitem__, group)
                    coming.append((name, group, found))
                    coming_bytes += self._bytes(group)
                if not coming:
                    return
                name, group, found = coming.popleft()
                try:
                    items = found.result(LIMIT_SECONDS) if isinstance(found, Future) else found
                except LateError:
                    raise GenattError(
                        f"a row group of data.path was not read in {LIMIT_SECONDS:.0f} s: see whether it answers"
                    ) from None
                coming_bytes -= self._bytes(group)
                del found
                yield name, items
        finally:
            if pool is not None:
                pool.shutdown(wait=False, cancel_futures=True)

    def _cached(self, group: int) -> Events | None:
        with self._lock:
            items = self._kept.get(group)
            if items is not None:
                self._kept.move_to_end(group)
            return items

    def _bytes(self, group: int) -> int:
        return self.dtype.itemsize * int(self.first_item_G[group + 1] - self.first_item_G[group])


def flat(lists: pa.ChunkedArray) -> npt.NDArray[Any]:
    """The values of all lists of a column, one after the other."""
    values: npt.NDArray[Any] = lists.combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return values
