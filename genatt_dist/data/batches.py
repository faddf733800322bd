"""Global batches of equal numbers of tokens, the same for every world size, dealt evenly to the ranks.

An epoch's plan is a pure function of (seed, epoch), made of lengths alone. Row groups come in a random order, and
consecutive ones form a shuffle buffer; what is smaller than one buffer is shuffled as a whole. Inside a buffer windows
are shuffled, sorted by length inside pools of a few batches (so that attention pads little), cut where the token budget
is full, and the batches shuffled again. The cursor is (epoch, batch): what lies before it is neither read nor planned.

Each rank plans the whole buffer and reads its part of it, so planning costs every rank a sort of the global batches'
windows; it is done in the background.

Legend: W windows, G row groups, B sequences, N positions (real tokens) and M items of this rank's part.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from data_pipeline.errors import GenattError
from genatt_dist.attention.noise import Purpose, derive
from genatt_dist.config import DataConfig, TrainingConfig
from genatt_dist.data.ahead import ahead
from genatt_dist.data.arrays import Events, Ints, Items, items_of, seconds_of
from genatt_dist.data.features import Bags, FeatureReader
from genatt_dist.data.sequences import Sequences, from_zero, gather
from genatt_dist.data.windows import Windows, ranges, window_counts, windows_of
from genatt_dist.model.jagged import Jagged

# Batches sorted by length together. More would pad less but make each batch's lengths more alike.
POOL_BATCHES = 16
# A buffer has strata of neighbouring row groups; a batch takes about so many windows of each. Fewer would hold ranks to
# their row groups more tightly, but the tokens of a stratum's share would be less equal.
STRATUM_WINDOWS = 64
# Batches put together before they are asked for; shuffle buffers, and steps of an evaluation, planned before that.
BATCHES_AHEAD = 4
BUFFERS_AHEAD = 2
STEPS_AHEAD = 16


class Read(NamedTuple):
    """Rows of a feature's table that positions read, on the device: see `features.Bags`."""

    row_K: Tensor
    first_N: Tensor


@dataclass(frozen=True)
class Batch:
    """One rank's part of a global batch.

    items_M: int64 dense ids of the whole windows, M = N + B: a window of m + 1 items has m positions. layout: where
    the positions lie.
    window_B: int64 window ids. chosen: indices into N whose target is trained, or None for all.
    num_tokens, num_targets, num_sequences: real positions, trained targets and sequences of the *global* batch.
    features: what the N inputs read of each feature; of the targets' times nothing is here.
    """

    items_M: Tensor
    layout: Jagged
    window_B: Tensor
    chosen: Tensor | None
    num_tokens: int
    num_targets: int
    num_sequences: int
    features: dict[str, Read] = field(default_factory=dict)

    @property
    def input_index_N(self) -> Tensor:
        """Index into M of the item at each position."""
        return torch.arange(len(self.layout.row_N), device=self.items_M.device) + self.layout.row_N

    @property
    def target_index_N(self) -> Tensor:
        """Index into M of the item after each position."""
        return self.input_index_N + 1

    @property
    def targets_N(self) -> Tensor:
        """Dense id of the item after each position: int64."""
        return self.items_M[self.target_index_N]


@dataclass(frozen=True)
class Planned:
    """A shuffle buffer: its windows, row group after row group, and their indices in each of its global batches, by
    rising length. number: of its first batch in the epoch. near: how batches are dealt, see `deal`.
    """

    windows: Windows
    batches: list[Ints]
    number: int
    near: bool

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
            return cut(members, self.windows.length_B[members], world_size, nearest=True)[rank]
        turn = np.arange(len(members)) % (2 * world_size)
        return members[::-1][np.minimum(turn, 2 * world_size - 1 - turn) == rank]


@dataclass(frozen=True)
class TrainingBatches:
    """The plan of all epochs over the training windows of one data set.

    window_G: int64 [G + 1], windows in the row groups before each. num_batches: of an epoch.
    """

    sequences: Sequences
    data: DataConfig
    seed: int
    window_G: Ints
    num_batches: int

    @staticmethod
    def plan(sequences: Sequences, data: DataConfig, training: TrainingConfig) -> TrainingBatches:
        """Cut windows of at most max_len positions (and their next items) from each user's training part.

        `windows=last` takes the newest one of a user; `all` goes back from the end, so that each item is a target
        exactly once.
        """
        windows = from_zero(window_counts(sequences.train, data))
        window_G, accumulated = windows[sequences.first_user_G], training.accumulation_steps
        total = int(window_G[-1])
        if not total:
            raise GenattError(
                f"{sequences.manifest.name}: no user has two training interactions, so nothing can be learnt from it"
            )
        if total < accumulated:
            raise GenattError(
                f"{sequences.manifest.name}: {total} training windows cannot fill training.accumulation_steps="
                f"{accumulated} batches: lower training.accumulation_steps"
            )
        updates = min(round(total / (training.batch_sequences * accumulated)), total // accumulated)
        return TrainingBatches(sequences, data, training.seed, window_G, max(1, updates) * accumulated)

    @property
    def num_windows(self) -> int:
        """Windows of an epoch: each is trained once."""
        return int(self.window_G[-1])

    def epoch(self, epoch: int, first: int = 0) -> Iterator[Windows]:
        """The global batches of one epoch from number `first` on. Every window is in exactly one, and no batch is
        empty: their number is the same in every epoch.
        """
        for planned in self.buffers(epoch, first):
            for index in range(max(0, first - planned.number), len(planned.batches)):
                yield planned.windows.of(planned.batches[index])

    def check(self, world_size: int, epochs: int = 1) -> None:
        """Raise GenattError when some rank would get no sequence in one of the first `epochs` epochs.

        Only where the first buffer comes near are the others looked at: shuffling changes the smallest batch a little.
        """
        least = min(map(len, next(self.buffers(0)).batches))
        if least <= 2 * world_size:
            least = min(len(batch) for epoch in range(epochs) for batch in self.epoch(epoch))
        if least < world_size:
            raise GenattError(
                f"world_size={world_size} ranks but a global batch holds as few as {least} sequences: "
                "every rank needs one; raise training.batch_sequences or lower world_size"
            )

    def iterate(
        self, epoch: int, first: int, rank: int, world_size: int, device: torch.device
    ) -> Generator[Batch, None, None]:
        """This rank's parts of the epoch's batches, from batch number `first` on.

        Row groups are read, and batches put together, in the background. Raises GenattError naming what cannot be read.
        """
        parts = ahead(self._parts(epoch, first, rank, world_size), BATCHES_AHEAD, "training batch")
        try:
            for part in parts:
                yield part.on(device)
        finally:
            parts.close()

    def buffers(self, epoch: int, first: int = 0) -> Iterator[Planned]:
        """The shuffle buffers of an epoch from the one with batch number `first` on, planned when asked for.

        A pure function of (seed, epoch): neither the number of ranks nor what was read before comes in.
        """
        if first >= self.num_batches:
            return
        total, groups = self.num_windows, len(self.window_G) - 1
        if total <= self.data.shuffle_windows:
            windows = self._windows(np.arange(groups))
            yield Planned(windows, _batches(windows.length_B, self.num_batches, 1, self._random(epoch)), 0, near=False)
            return
        order = self._random(epoch, 0).permutation(groups)
        filled = np.cumsum(np.diff(self.window_G)[order])
        least = max(self.data.shuffle_windows, POOL_BATCHES * -(-total // self.num_batches))
        number = max(1, total // least)
        # A buffer ends with the row group that brings it to its share; the batches of an epoch are shared likewise.
        ends = np.searchsorted(filled, total * np.arange(1, number) // number) + 1
        ends = np.concatenate(([0], ends, [groups]))
        batches = np.append(0, filled[ends[1:] - 1] * self.num_batches // total)
        batches, kept = np.unique(batches, return_index=True)  # a buffer too small for a batch is one with the next
        ends = ends[kept]
        for buffer, (low, high) in enumerate(pairwise(batches.tolist())):
            if high > first:
                windows = self._windows(order[ends[buffer] : ends[buffer + 1]])
                strata = max(1, len(windows) // ((high - low) * STRATUM_WINDOWS))
                random = self._random(epoch, 1 + buffer)
                yield Planned(windows, _batches(windows.length_B, high - low, strata, random), low, near=True)

    def _random(self, *words: int) -> np.random.Generator:
        key = int(derive(self.seed, int(Purpose.SHUFFLE), *words)) % (1 << 64)
        return np.random.Generator(np.random.Philox(key=key))

    def _windows(self, groups: Ints) -> Windows:
        """All windows of the users of these row groups."""
        low, high = self.sequences.first_user_G[groups], self.sequences.first_user_G[groups + 1]
        return windows_of(ranges(low, high - low), self.sequences.offsets, self.sequences.train, self.data)

    def _parts(self, epoch: int, first: int, rank: int, world_size: int) -> Generator[Part, None, None]:
        def wanted() -> Iterator[tuple[list[tuple[Windows, int, int]], Ints, Ints]]:
            for planned in self.buffers(epoch, first):
                parts = []
                for index in range(max(0, first - planned.number), len(planned.batches)):
                    members = planned.batches[index]
                    mine = planned.windows.of(planned.deal(index, rank, world_size))
                    parts.append((mine, len(members), int(planned.windows.length_B[members].sum())))
                start = np.concatenate([mine.start_B for mine, _, _ in parts])
                yield parts, start, np.concatenate([mine.length_B for mine, _, _ in parts]) + 1

        last = self.data.targets == "last"
        buffers = self.sequences.slices(wanted(), BUFFERS_AHEAD)
        try:
            for parts, items, first_W in buffers:
                done = 0
                for mine, sequences, tokens in parts:
                    here = first_W[done : done + len(mine)]
                    done += len(mine)
                    part = gather(items, here, mine.length_B + 1)
                    yield Part.of(part, mine, last, tokens, sequences, self.sequences.features)
        finally:
            buffers.close()


@dataclass(frozen=True)
class Part:
    """A rank's part of a global batch before it is on the device. tokens, sequences: of the global batch."""

    items: Items
    windows: Windows
    last_target_only: bool
    tokens: int
    sequences: int
    bags: dict[str, Bags]

    @staticmethod
    def of(
        events: Events, windows: Windows, last_target_only: bool, tokens: int, sequences: int, features: FeatureReader
    ) -> Part:
        """events: those of the windows, each with its last target."""
        bags: dict[str, Bags] = {}
        if features.num_rows:
            input_M = np.ones(len(events), np.bool_)
            input_M[np.cumsum(windows.length_B + 1) - 1] = False
            bags = _bags(features, events[input_M], windows.length_B)
        return Part(items_of(events), windows, last_target_only, tokens, sequences, bags)

    def on(self, device: torch.device) -> Batch:
        length_B = self.windows.length_B
        layout = Jagged.of(_to(length_B, device), int(length_B.max()), int(length_B.sum()))
        return Batch(
            items_M=_ids(self.items, device),
            layout=layout,
            window_B=_to(self.windows.id_B, device),
            chosen=layout.last_B if self.last_target_only else None,
            num_tokens=self.tokens,
            num_targets=self.sequences if self.last_target_only else self.tokens,
            num_sequences=self.sequences,
            features=_read(self.bags, device),
        )


def _batches(length: Ints, number: int, strata: int, random: np.random.Generator) -> list[Ints]:
    """Windows dealt into `number` batches in a random order, see `batches_of`."""
    batches = batches_of(random.permutation(len(length)), length, number, strata)
    return [batches[i] for i in random.permutation(number)]


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
            for piece in cut(pool, length_W[pool], share):
                pieces[batch].append(piece)
                batch += 1
    return [_merged(parts, length_W) for parts in pieces]


def _merged(pieces: list[Ints], length_W: npt.NDArray[np.uint16]) -> Ints:
    """One batch of the pieces of all strata, by rising length."""
    members = np.concatenate(pieces)
    return members if len(pieces) == 1 else members[np.argsort(length_W[members], kind="stable")]


def cut(members: Ints, tokens: npt.NDArray[Any], parts: int, nearest: bool = False) -> list[Ints]:
    """`members` cut into `parts` runs of equal tokens, none of them empty: before the member that would exceed a
    part's share, or where that is nearest.
    """
    filled, at = np.cumsum(tokens, dtype=np.int64), np.arange(1, parts)
    passed = filled - tokens / 2 if nearest else filled
    # At least one window each: a window longer than a part's tokens would leave the next ones empty.
    after = np.maximum.accumulate(np.searchsorted(passed, filled[-1] * at / parts) - at) + at
    return np.split(members, np.clip(after, at, len(members) - parts + at))


@dataclass(frozen=True)
class Histories:
    """Users to rank items for: their newest positions, what they have seen, and (when known) the true next item.

    items_N: int64; layout: positions; user_B: int64 index of the user (its noise key). seen_row_S, seen_item_S: int64
    pairs (row of the batch, item) to leave out. target_B: int64, or None. features: what the positions read of each.
    """

    items_N: Tensor
    layout: Jagged
    user_B: Tensor
    seen_row_S: Tensor
    seen_item_S: Tensor
    target_B: Tensor | None
    features: dict[str, Read] = field(default_factory=dict)

    @staticmethod
    def of(
        events: Events,
        first: Ints,
        end: Ints,
        users: Ints,
        max_len: int,
        device: torch.device,
        targets: Ints | None = None,
        features: FeatureReader | None = None,
    ) -> Histories:
        """Histories events[first[i]:end[i]]; the model sees the newest max_len items, all are seen.

        features: of the data set the model was trained on; without times in `events` the context is unknown.
        """
        lengths = np.minimum(end - first, max_len)
        shown, items = gather(events, end - lengths, lengths), items_of(events)
        bags = _bags(features, shown, lengths) if features is not None else {}
        return Histories(
            items_N=_ids(items_of(shown), device),
            layout=Jagged.of(_to(lengths, device), int(lengths.max()), int(lengths.sum())),
            user_B=_to(users, device),
            seen_row_S=torch.from_numpy(np.repeat(np.arange(len(users)), end - first)).to(device),
            seen_item_S=_ids(gather(items, first, end - first), device),
            target_B=None if targets is None else _to(targets, device),
            features=_read(bags, device),
        )


def evaluation_batches(
    sequences: Sequences, split: str, max_len: int, batch_users: int, rank: int, world_size: int, device: torch.device
) -> Generator[Histories, None, None]:
    """This rank's histories of every user that has a target in `split` (`valid` or `test`), in steps all ranks
    share. A rank reads the row groups of its own users only, ahead of the steps.
    """
    users = np.flatnonzero(sequences.has_target(split))
    if len(users) < world_size:
        raise GenattError(
            f"{len(users)} users have a {split} item, fewer than world_size={world_size}: evaluate on fewer ranks"
        )
    steps = min(-(-len(users) // batch_users), len(users) // world_size)
    end = sequences.history_end(split)

    def wanted() -> Iterator[tuple[Ints, Ints, Ints]]:
        for step in np.array_split(users, max(1, steps)):
            mine = np.array_split(step, world_size)[rank]
            yield mine, sequences.offsets[mine], end[mine] + 1 - sequences.offsets[mine]

    read = ahead(sequences.slices(wanted(), STEPS_AHEAD), BATCHES_AHEAD, "evaluation batch")
    try:
        for mine, events, first in read:
            target = first + end[mine] - sequences.offsets[mine]
            items = items_of(events)[target].astype(np.int64)
            yield Histories.of(events, first, target, mine, max_len, device, items, sequences.features)
    finally:
        read.close()


def _bags(features: FeatureReader, events: Events, lengths: Ints) -> dict[str, Bags]:
    return features.bags(items_of(events), lengths, seconds_of(events)) if features.num_rows else {}


def _read(bags: dict[str, Bags], device: torch.device) -> dict[str, Read]:
    return {name: Read(_to(bag.row_K, device), _to(bag.first_N, device)) for name, bag in bags.items()}


def _ids(items: Items, device: torch.device) -> Tensor:
    return _to(items.astype(np.int64), device)


def _to(values: npt.NDArray[np.int64], device: torch.device) -> Tensor:
    """The values on the device; from pinned memory, so that the copy to a GPU does not stop the step."""
    tensor = torch.from_numpy(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
