"""Signs of life: what each rank says of itself every few seconds, and what follows from those of all ranks.

Nothing here talks to anybody. Clocks of different hosts are never compared: a rank that is heard has a sign whose count
has changed since its listener last looked, by the listener's clock.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass

# What a rank may be doing, in the order of a step: a rank at an earlier one holds the others up.
SET_UP, VALIDATION, CHECKPOINT, END = "set-up", "validation", "checkpoint", "the end of training"
# Inside an update, by the name of the timer's section (training/timing.py); "" is what comes after the last of them.
UPDATE = {
    "input": "waiting for a batch",
    "lookup": "id exchange and lookup",
    "forward": "forward",
    "backward": "backward",
    "optimizer": "optimizer step",
    "": "the end of the update",
}
OPERATIONS = (SET_UP, *UPDATE.values(), VALIDATION, CHECKPOINT, END)

# What gloo and NCCL say of a peer that is gone, or that did not come in time.
_LOST_PEER = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Connection timed out",
    "No route to host",
    "Broken pipe",
    "remote process exited",
    "Timed out waiting",
    "Application timeout caused pair closure",
    "collective operation timeout",
)


def is_lost_peer(error: RuntimeError) -> bool:
    """Whether a collective failed with it because another rank did not take part."""
    return any(sign in str(error) for sign in _LOST_PEER)


@dataclass(frozen=True)
class Sign:
    """What a rank says. step: the update under way, from 1. seconds: in this operation so far. ended: how it ended, in
    words, if it has. broken: a collective failed there because another rank is gone.
    """

    rank: int
    host: str
    pid: int
    count: int
    step: int
    epoch: int
    operation: str
    seconds: float
    ended: str | None = None
    broken: bool = False

    def text(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def of(text: str | bytes) -> Sign:
        return Sign(**json.loads(text))

    @property
    def place(self) -> tuple[int, int]:
        """How far it is: of two ranks the one with the smaller place is behind."""
        return self.step, OPERATIONS.index(self.operation)

    @property
    def where(self) -> str:
        return f"in {self.operation} of step {self.step} (epoch {self.epoch + 1})"

    @property
    def who(self) -> str:
        return f"rank {self.rank} (host {self.host}, pid {self.pid})"


@dataclass(frozen=True)
class Limits:
    """Seconds. silence: without a sign. operation: by name, how long one operation of one step may last."""

    silence: float
    operation: Mapping[str, float]

    @staticmethod
    def of(silence_seconds: float, collective_seconds: float, checkpoint_seconds: float) -> Limits:
        """A batch of a validation, which ranks the whole catalogue, and the set-up, which fills the tables and loads
        kernels, get three times a step's time; a checkpoint what its writer waits for all parts, and a step's more.
        """
        operation = dict.fromkeys(OPERATIONS, collective_seconds)
        operation |= {SET_UP: 3 * collective_seconds, VALIDATION: 3 * collective_seconds}
        operation[CHECKPOINT] = checkpoint_seconds + collective_seconds
        return Limits(silence_seconds, operation)

    @property
    def longest(self) -> float:
        return max(self.operation.values())


def lost(signs: Sequence[Sign], silent: Mapping[int, float], limit: float) -> str | None:
    """The line that names the ranks that were not heard for `limit` seconds and have not said that they end."""
    gone = [sign for sign in signs if sign.ended is None and silent[sign.rank] > limit]
    if not gone:
        return None
    words = "; ".join(
        f"{sign.who} is lost: no sign of life for {silent[sign.rank]:.0f} s, the last one {sign.where}"
        for sign in gone[:3]
    )
    more = f"; and {len(gone) - 3} more ranks" if len(gone) > 3 else ""
    return words + more + _others(sign for sign in signs if sign not in gone)


def hanging(signs: Sequence[Sign], limits: Limits) -> str | None:
    """The line that names the ranks that hold the others up, where an operation takes too long anywhere."""
    alive = [sign for sign in signs if sign.ended is None]
    if not any(sign.seconds > limits.operation[sign.operation] for sign in alive):
        return None
    worst = max(alive, key=lambda sign: sign.seconds)
    least = min(sign.place for sign in alive)
    behind = sorted((sign for sign in alive if sign.place == least), key=lambda sign: sign.rank)
    if len(behind) == len(alive) > 1:
        return (
            f"all ranks hang {worst.where}, for {worst.seconds:.0f} s: look at the network between the hosts, or raise "
            "training.collective_seconds"
        )
    words = "; ".join(f"{sign.who} hangs {sign.where}, for {sign.seconds:.0f} s" for sign in behind[:3])
    return words + _others(sign for sign in alive if sign not in behind)


def _others(signs: Iterable[Sign]) -> str:
    """What the other ranks are doing, those at one place together."""
    places: dict[str, list[int]] = {}
    for sign in signs:
        place = f"ended ({sign.ended})" if sign.ended is not None else sign.where
        places.setdefault(place, []).append(sign.rank)
    return "".join(
        f"; {_ranks(ranks)} {'is' if len(ranks) == 1 else 'are'} {place}"
        if place.startswith("in ")
        else f"; {_ranks(ranks)} {place}"
        for place, ranks in places.items()
    )


def _ranks(ranks: Sequence[int]) -> str:
    """`rank 3`, or `ranks 0-2, 5`."""
    spans: list[list[int]] = []
    for rank in sorted(ranks):
        if spans and rank == spans[-1][1] + 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    words = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)
    return f"rank {words}" if len(ranks) == 1 else f"ranks {words}"
