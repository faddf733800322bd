"""How all ranks stop after the same step.

Agreement costs one number a step: an all-reduce of "I was asked to stop" begins after each step, on a gloo group of its
own, and is read after the next one, when it has long ended. So the ranks stop at most one step after the one in which
the first of them was asked, no step waits for it, and a GPU is not waited for. One rank alone stops at once.
"""

from __future__ import annotations

import datetime
import threading
from contextlib import suppress
from typing import Any

import torch
import torch.distributed as dist

from genatt_dist.training import preemption
from genatt_dist.training.checkpoint.store import Store

_LOOK_SECONDS = 5.0  # a storage that does not say what checkpoints there are is not waited for longer


class Agreement:
    """Whether the ranks stop now. All ranks ask at the same points, in the same order."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        """group: of all ranks, for tensors of the CPU; None for one rank alone."""
        self._group = group
        self._asked = torch.zeros(1, dtype=torch.uint8)
        self._work: Any = None

    def reached(self) -> bool:
        """Whether all ranks stop here. Collective; once it was true it is not to be asked again."""
        if self._group is None:
            return preemption.requested() is not None
        self.close()
        if self._asked.item():  # of the CPU
            return True
        if preemption.requested() is not None:
            self._asked.fill_(1)
        self._work = dist.all_reduce(self._asked, dist.ReduceOp.MAX, group=self._group, async_op=True)
        return False

    def reason(self) -> str:
        """Why, of the first rank that was asked; the same on all ranks. Collective, after `reached`."""
        mine = preemption.requested()
        told: list[str | None] = [mine.reason if mine else None]
        if self._group is not None:
            told *= dist.get_world_size(self._group)
            dist.all_gather_object(told, mine.reason if mine else None, group=self._group)
        rank, reason = next((rank, reason) for rank, reason in enumerate(told) if reason)
        return reason if len(set(told)) == 1 else f"{reason} on rank {rank}"

    def close(self) -> None:
        """Wait for the question under way."""
        if self._work is not None:
            self._work.wait()
            self._work = None


def control_group(seconds: float) -> dist.ProcessGroup | None:
    """A gloo group of all ranks beside the one that trains, whose operations may take so long; None for one rank."""
    if dist.get_world_size() == 1:
        return None
    return dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=seconds))


def newest_checkpoint(store: Store) -> int | None:
    """The step of the newest complete checkpoint, or None: there is none, or the storage does not answer."""
    found: list[int] = []

    def look() -> None:
        with suppress(Exception):
            found.extend(store.complete()[-1:])

    looking = threading.Thread(target=look, name="look", daemon=True)
    looking.start()
    looking.join(_LOOK_SECONDS)
    return found[0] if found else None
