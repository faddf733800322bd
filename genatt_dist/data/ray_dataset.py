"""Prepared shards as a data set of Ray's, which Ray reads in its own processes and hands to the workers of Ray Train.

A row is a training window: `window` int64 (its id), `items` list<int32> (its positions and the last target), and where
features need them `times` list<int64> of these, in the manifest's unit. This module imports no torch, for the processes
that read need none.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from data_pipeline.format import Manifest, load_manifest, read_index
from genatt_dist.config import DataConfig
from genatt_dist.data.row_groups import Shards, flat
from genatt_dist.data.sequences import gather
from genatt_dist.data.windows import WINDOW_BITS, windows_of

if TYPE_CHECKING:
    from ray.data import DataIterator, Dataset
    from ray.train import DataConfig as RayDataConfig

MOST_BLOCKS = 10_000  # of a data set; Ray keeps track of each


def schema(timed: bool) -> pa.Schema:
    """Of the rows; timed: with the time of each item."""
    fields = [("window", pa.int64()), ("items", pa.list_(pa.int32()))]
    return pa.schema([*fields, ("times", pa.list_(pa.int64()))] if timed else fields)


def ray_dataset(path: str, data: DataConfig, timed: bool = False) -> Dataset:
    """The training windows of the shards at `path` as a Ray data set, a block for each row group; read when streamed.

    timed: with times, which features of type context need.
    Raises GenattError when there is no prepared data set.
    """
    import ray

    manifest = load_manifest(path)
    work, first_user = [], 0
    for shard, file in enumerate(manifest.files):
        for number, low in enumerate(range(0, file.users, manifest.row_group_size)):
            work.append({"shard": shard, "row_group": number, "first_user": first_user + low})
        first_user += file.users
    blocks = ray.data.from_items(work, override_num_blocks=min(len(work), MOST_BLOCKS))
    return blocks.map_batches(_Cut(path, data, timed), batch_size=1, batch_format="pyarrow", zero_copy_batch=True)


def every_row() -> RayDataConfig:
    """How Ray Train has to split the data set: Ray's default cuts rows off, so that all workers get equally many."""
    import ray.train

    class EveryRow(ray.train.DataConfig):
        def configure(
            self, datasets: dict[str, Dataset], world_size: int, *_: Any, **__: Any
        ) -> list[dict[str, DataIterator]]:
            shards: list[dict[str, DataIterator]] = [{} for _ in range(world_size)]
            for name, dataset in datasets.items():
                for own, part in zip(shards, dataset.streaming_split(world_size, equal=False), strict=True):
                    own[name] = part
            return shards

    return EveryRow()


@dataclass(frozen=True)
class _Cut:
    """Makes rows of a row group, in a process of Ray's. The block passed names it: shard, row_group, first_user."""

    path: str
    data: DataConfig
    timed: bool

    def __call__(self, work: pa.Table) -> pa.Table:
        tables = [self._rows(**row) for row in work.to_pylist()]
        return pa.concat_tables(tables)

    def _rows(self, shard: int, row_group: int, first_user: int) -> pa.Table:
        manifest, shards = _opened(self.path)
        names = ["item_ids", "timestamps"] if self.timed else ["item_ids"]
        columns = shards.columns(shard, [row_group], names)
        index = _index(self.path, shard).slice(row_group * manifest.row_group_size, len(columns))
        offsets = np.append(0, np.cumsum(index["length"].to_numpy(), dtype=np.int64))
        train = index["train"].to_numpy()
        windows = windows_of(np.arange(len(columns)), offsets, train, self.data)
        cut = [gather(flat(columns[name]), windows.start_B, windows.length_B + 1) for name in names]
        ends = np.append(0, np.cumsum(windows.length_B + 1)).astype(np.int32)
        ids = windows.id_B + (first_user << WINDOW_BITS)
        lists = [pa.ListArray.from_arrays(ends, values) for values in cut]
        return pa.table([ids, *lists], schema=schema(self.timed))


@lru_cache(maxsize=4)
def _opened(path: str) -> tuple[Manifest, Shards]:
    manifest = load_manifest(path)
    return manifest, Shards(path, manifest.files)


@lru_cache(maxsize=4)
def _index(path: str, shard: int) -> pa.Table:
    return read_index(path, _opened(path)[0].files[shard])
