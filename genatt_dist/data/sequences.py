"""The sequence shards in memory: flat item ids with offsets, and the leave-one-out rule as index arithmetic.

Legend: U users, T interactions. User u's items are `items[offsets[u]:offsets[u + 1]]`, oldest first.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from data_pipeline import format as shards
from data_pipeline.errors import GenattError

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Sequences:
    """All users' histories.

    items: int32 [T], dense ids 1..num_items. offsets: int64 [U + 1]. user_ids: Arrow array [U] of original ids.
    popularity: int64 [num_items + 1], interactions of each item in the training part (index = dense id).
    """

    items: npt.NDArray[np.int32]
    offsets: Ints
    user_ids: pa.Array
    popularity: Ints
    manifest: shards.Manifest
    manifest_hash: str

    @staticmethod
    def read(path: str, verify: bool = False) -> Sequences:
        """Read what `genatt prepare` published at `path`; `verify` checks every file's sha256 first.

        Raises GenattError naming the file: missing manifest, corrupted shard, ids outside 1..V.
        """
        manifest = shards.load_manifest(path)
        if verify:
            shards.verify(path, manifest)
        tables = [shards.read_shard(path, file) for file in manifest.files]
        lists = pa.chunked_array([chunk for table in tables for chunk in table["item_ids"].chunks]).combine_chunks()
        users = pa.chunked_array([chunk for table in tables for chunk in table["user_id"].chunks]).combine_chunks()
        items = lists.flatten().to_numpy()
        offsets = np.zeros(len(lists) + 1, np.int64)
        np.cumsum(pc.list_value_length(lists).to_numpy(), out=offsets[1:])
        if len(items) and not (int(items.min()) >= 1 and int(items.max()) <= manifest.num_items):
            raise GenattError(
                f"{path}: item ids span {items.min()}..{items.max()}, not 1..{manifest.num_items}; prepare "
                "the data again"
            )
        vocabulary = shards.read_vocabulary(path, manifest)
        popularity = np.zeros(manifest.num_items + 1, np.int64)
        popularity[vocabulary["dense_id"].to_numpy()] = vocabulary["train_count"].to_numpy()
        return Sequences(items, offsets, users, popularity, manifest, shards.manifest_hash(path))

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

    def history_end(self, split: str) -> Ints:
        """Where each user's history ends for `train`, `valid` or `test`: int64 [U], an index into `items`.

        Users long enough for the rule keep their last item for test and the one before for valid; others train with
        all they have.
        """
        held_out = {"train": 2, "valid": 2, "test": 1}[split]
        return self.offsets[1:] - np.where(self.has_targets, held_out, 0)

    @property
    def has_targets(self) -> npt.NDArray[np.bool_]:
        """Which users have a valid and a test item: bool [U]."""
        return self.lengths >= self.manifest.split.min_length


def gather(items: npt.NDArray[np.int32], starts: Ints, lengths: Ints) -> npt.NDArray[np.int32]:
    """Concatenate items[starts[i] : starts[i] + lengths[i]] for all i."""
    ends = np.cumsum(lengths)
    within = np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - lengths, lengths)
    return items[np.repeat(starts, lengths) + within]
