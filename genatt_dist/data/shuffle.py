"""How an epoch's windows are shuffled into global batches of equal tokens, and how a batch is dealt to the ranks.

Row groups come in a random order, and consecutive ones form a shuffle buffer. Inside a buffer windows are shuffled,
sorted by length inside pools of a few batches (so that attention pads little), cut where the token budget is full, and
the batches shuffled again. All of it is made of lengths and a generator alone: nothing is read here.

Legend: W windows, G row groups, B sequences.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from data_pipeline.errors import GenattError
from genatt_dist.data.arrays import Ints
from genatt_dist.data.windows import Windows

# Batches sorted by length together. More would pad less but make each batch's lengths more alike.
POOL_BATCHES = 16
# A buffer has strata of neighbouring row groups; a batch takes about so many windows of each. Fewer would hold ranks to
# their row groups more tightly, but the tokens of a stratum's share would be less equal.
_STRATUM_WINDOWS = 64


@dataclass(frozen=True)
class Planned:
    """A shuffle buffer: its windows, row group after row group, and their indices in each of its global batches, by
    rising length. number: of its first batch in the epoch. near: how batches are dealt, see `deal`.
    """

    windows: Windows
    batches: list[Ints]
    number: int
    near: bool

    @staticmethod
    def of(windows: Windows, count: int, random: np.random.Generator, number: int, near: bool) -> Planned:
        """The windows dealt into `count` batches in a random order."""
        strata = max(1, len(windows) // (count * _STRATUM_WINDOWS)) if near else 1
        batches = batches_of(random.permutation(len(windows)), windows.length_B, count, strata)
        return Planned(windows, [batches[i] for i in random.permutation(count)], number, near)

    def deal(self, index: int, rank: int, world_size: int) -> Ints:
        """The windows of global batch `index` that one of the ranks trains: indices, none twice, none left out.

        A data set that is shuffled as a whole is small, so every rank keeps all of it: the longest windows are dealt
        0 1 … r r … 1 0, for parts of nearly equal tokens. Otherwise a rank should read few row groups: the batch is
        cut at equal tokens in the order of the row groups, so that a rank's windows lie in the same few through all
        batches of the buffer. A part's tokens then differ from its share by one window's at most, and all ranks
        together read at most twice what one alone would with 256 sequences a rank on up to 1,024 ranks, about three
        times with 64 (`tests/data/test_locality.py`); dealt the other way they would read 640 times as much.
        """
        members = self.batches[index]
        if len(members) < world_size:
            raise GenattError(
                f"a global batch of {len(members)} sequences for {world_size} ranks: raise training.batch_sequences"
            )
        if self.near:
            members = np.sort(members)
            return _cut(members, self.windows.length_B[members], world_size, nearest=True)[rank]
        turn = np.arange(len(members)) % (2 * world_size)
        return members[::-1][np.minimum(turn, 2 * world_size - 1 - turn) == rank]


def buffers_of(order: Ints, window_G: Ints, num_batches: int, shuffle_windows: int) -> Iterator[tuple[Ints, int, int]]:
    """Row groups in a random order cut into shuffle buffers of at least `shuffle_windows` windows and a pool of
    batches: the row groups of each, and its first and one past its last batch in the epoch.

    window_G: int64 [G + 1], windows in the row groups before each.
    """
    total = int(window_G[-1])
    filled = np.cumsum(np.diff(window_G)[order])
    least = max(shuffle_windows, POOL_BATCHES * -(-total // num_batches))
    number = max(1, total // least)
    # A buffer ends with the row group that brings it to its share; the batches of an epoch are shared likewise.
    ends = np.searchsorted(filled, total * np.arange(1, number) // number) + 1
    ends = np.concatenate(([0], ends, [len(order)]))
    batches = np.append(0, filled[ends[1:] - 1] * num_batches // total)
    batches, kept = np.unique(batches, return_index=True)  # a buffer too small for a batch is one with the next
    for (start, end), (low, high) in zip(pairwise(ends[kept].tolist()), pairwise(batches.tolist()), strict=True):
        yield order[start:end], low, high


def batches_of(shuffled: Ints, length: Ints, number: int, strata: int = 1) -> list[Ints]:
    """Windows in a random order cut into `number` batches of nearly equal tokens and alike lengths, pools of
    POOL_BATCHES after each other: indices, by rising length.

    Each batch takes its share of every stratum of neighbouring windows, so that batches are spread evenly over row
    groups, however many ranks they are cut for.
    """
    length_W = length.astype(np.uint16)  # at most 4096; numpy sorts 16 bits by radix, in linear time
    stratum = (shuffled * strata // len(length_W)).astype(np.uint16)
    shuffled = shuffled[np.argsort(stratum, kind="stable")]
    num_pools = -(-number // POOL_BATCHES)
    shares = [len(part) for part in np.array_split(np.arange(number), num_pools)]
    pieces: list[list[Ints]] = [[] for _ in range(number)]
    for members in np.split(shuffled, np.cumsum(np.bincount(stratum))[:-1]):
        batch = 0
        for share, pool in zip(shares, np.array_split(members, num_pools), strict=True):
            pool = pool[np.argsort(length_W[pool], kind="stable")]
            for piece in _cut(pool, length_W[pool], share):
                pieces[batch].append(piece)
                batch += 1
    return [_merged(parts, length_W) for parts in pieces]


def _merged(pieces: list[Ints], length_W: npt.NDArray[np.uint16]) -> Ints:
    """One batch of the pieces of all strata, by rising length."""
    members = np.concatenate(pieces)
    return members if len(pieces) == 1 else members[np.argsort(length_W[members], kind="stable")]


def _cut(members: Ints, tokens: npt.NDArray[Any], parts: int, nearest: bool = False) -> list[Ints]:
    """`members` cut into `parts` runs of equal tokens, none of them empty: before the member that would exceed a
    part's share, or where that is nearest.
    """
    filled, at = np.cumsum(tokens, dtype=np.int64), np.arange(1, parts)
    passed = filled - tokens / 2 if nearest else filled
    # At least one window each: a window longer than a part's tokens would leave the next ones empty.
    after = np.maximum.accumulate(np.searchsorted(passed, filled[-1] * at / parts) - at) + at
    return np.split(members, np.clip(after, at, len(members) - parts + at))
