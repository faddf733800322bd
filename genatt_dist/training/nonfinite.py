"""The losses since the last record, and the batch of the one that was no number: RUN/nonfinite.json.

Nothing is looked at inside a step: the tensors of the last updates' losses and ids are kept where they are, and read
together when the log is written. The file has the first update that was not finite; at most some thousand windows of
it, spread over the ranks, so that it stays small on any number of them.

    {"step", "epoch", "batch": number in the epoch of its (first) global batch, "what": in words,
     "ranks": [{"rank", "loss", "generative_loss": this rank's shares, "num_windows": of this rank in all,
                "windows": [{"user": row of the data set, "window": number in its history, newest first,
                             "items": dense ids, oldest first}, …]}, …]}

Legend: S updates, B windows, M window items.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from data_pipeline.errors import GenattError
from genatt_dist.data.batches import Batch
from genatt_dist.data.windows import WINDOW_BITS
from genatt_dist.training.engine import sum_over_ranks
from genatt_dist.training.step import Losses

NONFINITE = "nonfinite.json"
_MOST_WINDOWS, _MOST_ITEMS = 2048, 1_000_000  # in the file; a rank has its share of them
REMEDY = "lower training.learning_rate, or set training.gradient_clipping=1.0, and train again"


class NotFiniteError(GenattError):
    """Weights or state that are no numbers, which no checkpoint may hold."""


@dataclass(frozen=True)
class _Ids:
    """Ids of this rank's part of a batch, where they lie."""

    window_B: Tensor
    length_B: Tensor
    items_M: Tensor


@dataclass(frozen=True)
class _Update:
    step: int
    epoch: int
    batch: int
    losses: Losses
    parts: list[_Ids]


class Trail:
    """Updates since the last record of the log. before: losses [S, 2] of those that a stopped run had not told yet."""

    def __init__(self, run: Path, before: Sequence[Sequence[float]] = ()) -> None:
        self._run, self._before = run, [list(losses) for losses in before]
        self._updates: list[_Update] = []
        self._last: _Update | None = None

    def __len__(self) -> int:
        return len(self._before) + len(self._updates)

    @property
    def num_updates(self) -> int:
        """Those that this process did."""
        return len(self._updates)

    def add(self, losses: Losses, batches: Sequence[Batch], step: int, epoch: int, batch: int) -> None:
        """An update that was done. step: its number, from 1; batch: of its first batch in the epoch."""
        parts = [_Ids(one.window_B, one.layout.lengths_B, one.items_M) for one in batches]
        self._last = _Update(step, epoch, batch, losses, parts)
        self._updates.append(self._last)

    def losses(self) -> list[list[float]]:
        """Both losses of each update, summed over ranks: [S, 2]. Collective.

        Raises GenattError where one is not finite, and leaves the file.
        """
        if not self._updates:
            return list(self._before)
        shares = torch.stack([torch.stack(update.losses) for update in self._updates])
        found: list[list[float]] = sum_over_ranks(shares).tolist()
        for update, (recommendation, generative) in zip(self._updates, found, strict=True):
            if not math.isfinite(recommendation + generative):
                what = f"loss is {recommendation} (generative {generative})"
                raise GenattError(self._explained(what, update))
        return self._before + found

    def clear(self) -> None:
        """They are recorded."""
        self._before, self._updates = [], []

    def explain(self, what: NotFiniteError) -> GenattError:
        """The error of weights that the last update left, with the file. Collective."""
        return GenattError(self._explained(str(what), self._last)) if self._last else what

    def _explained(self, what: str, update: _Update) -> str:
        place = self._run / NONFINITE
        self._write(place, what, update)
        return (
            f"{what} at step {update.step} (epoch {update.epoch + 1}): {REMEDY}; the users and items of its batch "
            f"are in {place}"
        )

    def _write(self, place: Path, what: str, update: _Update) -> None:
        world_size = dist.get_world_size()
        mine = _rank_facts(update, max(4, _MOST_WINDOWS // world_size), _MOST_ITEMS // world_size)
        ranks: list[Any] = [mine] * world_size
        if world_size > 1:
            dist.all_gather_object(ranks, mine)
        if dist.get_rank() != 0:
            return
        facts = {"step": update.step, "epoch": update.epoch, "batch": update.batch, "what": what, "ranks": ranks}
        temporary = place.with_name(f".{NONFINITE}.{os.getpid()}")
        temporary.write_text(json.dumps(facts))
        temporary.rename(place)


def _rank_facts(update: _Update, most_windows: int, most_items: int) -> dict[str, Any]:
    windows: list[dict[str, Any]] = []
    for part in update.parts:
        items = part.items_M.tolist()
        first = 0
        for window, length in zip(part.window_B.tolist(), part.length_B.tolist(), strict=True):
            if len(windows) == most_windows or most_items < 0:
                break
            shown = items[first : first + length + 1]  # one item more than positions
            user, number = window >> WINDOW_BITS, window & ((1 << WINDOW_BITS) - 1)
            windows.append({"user": user, "window": number, "items": shown})
            first, most_items = first + length + 1, most_items - length - 1
    recommendation, generative = (float(loss) for loss in update.losses)
    return {
        "rank": dist.get_rank(),
        "loss": recommendation if math.isfinite(recommendation) else str(recommendation),
        "generative_loss": generative if math.isfinite(generative) else str(generative),
        "num_windows": sum(len(part.window_B) for part in update.parts),
        "windows": windows,
    }
