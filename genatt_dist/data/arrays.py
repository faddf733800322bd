"""Arrays of the loader: items alone, or events, which are items with their times."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Items = npt.NDArray[np.int32]
ITEM = np.dtype(np.int32)
# What is sliced and gathered alike: `Items`, or an array of EVENT. Packed: 12 bytes each.
Events = npt.NDArray[Any]
EVENT = np.dtype([("item", np.int32), ("seconds", np.int64)])


def timed(items: Items, seconds: Ints) -> Events:
    """Items together with their times."""
    events = np.empty(len(items), EVENT)
    events["item"], events["seconds"] = items, seconds
    return events


def items_of(events: Events) -> Items:
    """The dense ids, as they lie there where there is nothing else."""
    return events if events.dtype != EVENT else np.ascontiguousarray(events["item"])


def seconds_of(events: Events) -> Ints | None:
    """Seconds since 1970 of each, None of items alone."""
    return np.ascontiguousarray(events["seconds"]) if events.dtype == EVENT else None
