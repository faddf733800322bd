"""Global batches of equal numbers of tokens, the same for every world size, dealt evenly to the ranks.

An epoch's plan is a pure function of (seed, epoch): windows are shuffled, sorted by length inside pools of a few
batches (so that attention pads little), cut where the token budget is full, and the batches shuffled again. The cursor
is (epoch, batch).

Legend: W windows, B sequences, N positions (real tokens) and M items of this rank's part.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from data_pipeline.errors import GenattError
from genatt_dist.attention.noise import Purpose, derive
from genatt_dist.config import DataConfig, TrainingConfig
from genatt_dist.data.sequences import Ints, Sequences, gather
from genatt_dist.model.jagged import Jagged

# Batches sorted by length together. More would pad less but make each batch's lengths more alike.
POOL_BATCHES = 16
# A window's id is its user's index and its number in the user's history; keyed noise hangs on it.
_WINDOW_BITS = 20


@dataclass(frozen=True)
class Batch:
    """One rank's part of a global batch.

    items_M: int64 dense ids of the whole windows, M = N + B: a window of m + 1 items has m positions. layout: where
    the positions lie.
    window_B: int64 window ids. chosen: indices into N whose target is trained, or None for all.
    num_tokens, num_targets, num_sequences: real positions, trained targets and sequences of the *global* batch.
    """

    items_M: Tensor
    layout: Jagged
    window_B: Tensor
    chosen: Tensor | None
    num_tokens: int
    num_targets: int
    num_sequences: int

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
class TrainingBatches:
    """The plan of all epochs over the training windows of one data set."""

    items: npt.NDArray[np.int32]
    starts: Ints
    lengths: Ints
    windows: Ints
    num_batches: int
    last_target_only: bool
    seed: int

    @staticmethod
    def plan(sequences: Sequences, data: DataConfig, training: TrainingConfig) -> TrainingBatches:
        """Cut windows of at most max_len positions (and their next items) from each user's training part.

        `windows=last` takes the newest one of a user; `all` goes back from the end, so that each item is a target
        exactly once.
        """
        targets = sequences.history_end("train") - sequences.offsets[:-1] - 1
        users = np.flatnonzero(targets >= 1)
        counts = np.minimum(targets[users], data.max_len) if data.windows == "last" else targets[users]
        number = -(-counts // data.max_len)
        user = np.repeat(users, number)
        index = np.arange(len(user)) - np.repeat(np.cumsum(number) - number, number)
        # Positions end before the user's last training item, which is only a target.
        ends = sequences.history_end("train")[user] - 1 - index * data.max_len
        starts = np.maximum(ends - data.max_len, sequences.offsets[user])
        if not len(user):
            raise GenattError(
                f"{sequences.manifest.name}: no user has two training interactions, so nothing can be learnt from it"
            )
        lengths = ends - starts
        accumulated = training.accumulation_steps
        if len(lengths) < accumulated:
            raise GenattError(
                f"{sequences.manifest.name}: {len(lengths)} training windows cannot fill training.accumulation_steps="
                f"{accumulated} batches: lower training.accumulation_steps"
            )
        updates = min(round(len(lengths) / (training.batch_sequences * accumulated)), len(lengths) // accumulated)
        return TrainingBatches(
            items=sequences.items,
            starts=starts,
            lengths=lengths,
            windows=(user << _WINDOW_BITS) + index,
            num_batches=max(1, updates) * accumulated,
            last_target_only=data.targets == "last",
            seed=training.seed,
        )

    def epoch(self, epoch: int) -> list[Ints]:
        """The global batches of one epoch: for each, the indices of its windows. Every window is in exactly one, and
        no batch is empty: their number is the same in every epoch.
        """
        key = int(derive(self.seed, int(Purpose.SHUFFLE), epoch)) % (1 << 64)
        random = np.random.Generator(np.random.Philox(key=key))
        shuffled = random.permutation(len(self.starts))
        num_pools = -(-self.num_batches // POOL_BATCHES)
        batches: list[Ints] = []
        shares = [len(part) for part in np.array_split(np.arange(self.num_batches), num_pools)]
        for share, members in zip(shares, np.array_split(shuffled, num_pools), strict=True):
            members = members[np.argsort(self.lengths[members], kind="stable")]
            filled = np.cumsum(self.lengths[members])
            cut = np.arange(1, share)
            # At least one window each: a window longer than a batch's tokens would leave the next ones empty.
            after = np.maximum.accumulate(np.searchsorted(filled, filled[-1] * cut / share) - cut) + cut
            batches += np.split(members, np.clip(after, cut, len(members) - share + cut))
        return [batches[i] for i in random.permutation(len(batches))]

    def check(self, world_size: int, epochs: int = 1) -> None:
        """Raise GenattError when some rank would get no sequence in one of the first `epochs` epochs.

        Only where the first comes near are the others looked at: shuffling changes the smallest batch a little.
        """
        least = min(len(batch) for batch in self.epoch(0))
        if least <= 2 * world_size:
            least = min([least, *(len(batch) for epoch in range(1, epochs) for batch in self.epoch(epoch))])
        if least < world_size:
            raise GenattError(
                f"world_size={world_size} ranks but a global batch holds as few as {least} sequences: "
                "every rank needs one; raise training.batch_sequences or lower world_size"
            )

    def iterate(self, epoch: int, first: int, rank: int, world_size: int, device: torch.device) -> Iterator[Batch]:
        """This rank's parts of the epoch's batches, from batch number `first` on."""
        for members in self.epoch(epoch)[first:]:
            yield self._part(members, rank, world_size, device)

    def _part(self, members: Ints, rank: int, world_size: int, device: torch.device) -> Batch:
        # Longest first, dealt 0 1 … r r … 1 0: parts of nearly equal tokens (a batch's windows lie sorted by length).
        turn = np.arange(len(members)) % (2 * world_size)
        mine = members[::-1][np.minimum(turn, 2 * world_size - 1 - turn) == rank]
        if not len(mine):
            raise GenattError(
                f"rank {rank} got no sequence of a global batch of {len(members)}: raise training.batch_sequences"
            )
        starts, lengths = self.starts[mine], self.lengths[mine]
        layout = Jagged.of(_to(lengths, device), int(lengths.max()), int(lengths.sum()))
        return Batch(
            items_M=_ids(gather(self.items, starts, lengths + 1), device),
            layout=layout,
            window_B=_to(self.windows[mine], device),
            chosen=layout.last_B if self.last_target_only else None,
            num_tokens=int(self.lengths[members].sum()),
            num_targets=len(members) if self.last_target_only else int(self.lengths[members].sum()),
            num_sequences=len(members),
        )


@dataclass(frozen=True)
class Histories:
    """Users to rank items for: their newest positions, what they have seen, and (when known) the true next item.

    items_N: int64; layout: positions; user_B: int64 index of the user (its noise key). seen_row_S, seen_item_S: int64
    pairs (row of the batch, item) to leave out. target_B: int64, or None.
    """

    items_N: Tensor
    layout: Jagged
    user_B: Tensor
    seen_row_S: Tensor
    seen_item_S: Tensor
    target_B: Tensor | None

    @staticmethod
    def of(
        items: npt.NDArray[np.int32],
        first: Ints,
        end: Ints,
        users: Ints,
        max_len: int,
        device: torch.device,
        targets: Ints | None = None,
    ) -> Histories:
        """Histories items[first[i]:end[i]]; the model sees the newest max_len items, all are seen."""
        lengths = np.minimum(end - first, max_len)
        return Histories(
            items_N=_ids(gather(items, end - lengths, lengths), device),
            layout=Jagged.of(_to(lengths, device), int(lengths.max()), int(lengths.sum())),
            user_B=_to(users, device),
            seen_row_S=torch.from_numpy(np.repeat(np.arange(len(users)), end - first)).to(device),
            seen_item_S=_ids(gather(items, first, end - first), device),
            target_B=None if targets is None else _to(targets, device),
        )


def evaluation_batches(
    sequences: Sequences, split: str, max_len: int, batch_users: int, rank: int, world_size: int, device: torch.device
) -> Iterator[Histories]:
    """This rank's histories of every user that has a target in `split` (`valid` or `test`), in steps all ranks
    share.
    """
    users = np.flatnonzero(sequences.has_targets)
    if len(users) < world_size:
        raise GenattError(
            f"{len(users)} users have a {split} item, fewer than world_size={world_size}: evaluate on fewer ranks"
        )
    steps = min(-(-len(users) // batch_users), len(users) // world_size)
    end = sequences.history_end(split)
    for step in np.array_split(users, max(1, steps)):
        mine = np.array_split(step, world_size)[rank]
        yield Histories.of(
            sequences.items,
            sequences.offsets[mine],
            end[mine],
            mine,
            max_len,
            device,
            targets=sequences.items[end[mine]].astype(np.int64),
        )


def _ids(items: npt.NDArray[np.int32], device: torch.device) -> Tensor:
    return _to(items.astype(np.int64), device)


def _to(values: npt.NDArray[np.int64], device: torch.device) -> Tensor:
    """The values on the device; from pinned memory, so that the copy to a GPU does not stop the step."""
    tensor = torch.from_numpy(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
