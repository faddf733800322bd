"""The training batches of a data set: which windows each has, and a rank's part of it read and put on the device.

Global batches have equal numbers of tokens, are the same for every world size and dealt evenly to the ranks. An epoch's
plan is a pure function of (seed, epoch), made of lengths alone (data/shuffle.py); what is smaller than one shuffle
buffer is shuffled as a whole. The cursor is (epoch, batch): what lies before it is neither read nor planned.

Each rank plans the whole buffer and reads its part of it, so planning costs every rank a sort of the global batches'
windows; it is done in the background.

Legend: W windows, G row groups, B sequences, N positions (real tokens) and M items of this rank's part.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from data_pipeline.errors import GenattError
from genatt_dist.attention.noise import Purpose, derive
from genatt_dist.config import DataConfig, TrainingConfig
from genatt_dist.data.ahead import BATCHES_AHEAD, ahead
from genatt_dist.data.arrays import Events, Ints, Items, items_of, seconds_of
from genatt_dist.data.device import Read, ids_on, read_on, values_on
from genatt_dist.data.features import Bags, FeatureReader
from genatt_dist.data.sequences import Sequences, from_zero, gather
from genatt_dist.data.shuffle import Planned, buffers_of
from genatt_dist.data.windows import Windows, ranges, window_counts, windows_of
from genatt_dist.model.jagged import Jagged

_BUFFERS_AHEAD = 2  # shuffle buffers planned before their batches are put together


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
            inputs = events[input_M]
            bags = features.bags(items_of(inputs), windows.length_B, seconds_of(inputs))
        return Part(items_of(events), windows, last_target_only, tokens, sequences, bags)

    def on(self, device: torch.device) -> Batch:
        length_B = self.windows.length_B
        layout = Jagged.of(values_on(length_B, device), int(length_B.max()), int(length_B.sum()))
        return Batch(
            items_M=ids_on(self.items, device),
            layout=layout,
            window_B=values_on(self.windows.id_B, device),
            chosen=layout.last_B if self.last_target_only else None,
            num_tokens=self.tokens,
            num_targets=self.sequences if self.last_target_only else self.tokens,
            num_sequences=self.sequences,
            features=read_on(self.bags, device),
        )


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
        groups = len(self.window_G) - 1
        if self.num_windows <= self.data.shuffle_windows:
            yield Planned.of(self._windows(np.arange(groups)), self.num_batches, self._random(epoch), 0, near=False)
            return
        order = self._random(epoch, 0).permutation(groups)
        parts = buffers_of(order, self.window_G, self.num_batches, self.data.shuffle_windows)
        for buffer, (chosen, low, high) in enumerate(parts):
            if high > first:
                yield Planned.of(self._windows(chosen), high - low, self._random(epoch, 1 + buffer), low, near=True)

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
        buffers = self.sequences.slices(wanted(), _BUFFERS_AHEAD)
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
