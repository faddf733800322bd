"""Training windows: the stretches of users' histories a model is trained on. Without torch, for processes of Ray Data.

Legend: B windows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from genatt_dist.config import DataConfig
from genatt_dist.data.arrays import Ints, Items

# A window's id is its user's index and its number in the user's history; keyed noise hangs on it.
WINDOW_BITS = 20


@dataclass(frozen=True)
class Windows:
    """Stretches of users' histories, int64 [B] each: the place of the first item among all items, the number of
    positions (a window has one item more), and the id.
    """

    start_B: Ints
    length_B: Ints
    id_B: Ints

    def __len__(self) -> int:
        return len(self.start_B)

    def of(self, index: Ints) -> Windows:
        """Those with these indices, in this order."""
        return Windows(self.start_B[index], self.length_B[index], self.id_B[index])


def windows_of(users: Ints, offsets: Ints, train: Items, data: DataConfig) -> Windows:
    """The training windows of some users, user after user, the newest of a user first. offsets, train: of all users."""
    number = window_counts(train[users], data)
    user, index = np.repeat(users, number), ranges(np.zeros(len(users), np.int64), number)
    # Positions end before the user's last training item, which is only a target.
    end = offsets[user] + train[user] - 1 - index * data.max_len
    start = np.maximum(end - data.max_len, offsets[user])
    return Windows(start, end - start, (user << WINDOW_BITS) + index)


def window_counts(train: Items, data: DataConfig) -> Ints:
    """How many windows each user has, by the number of its training items."""
    targets = np.maximum(train.astype(np.int64) - 1, 0)
    return np.minimum(targets, 1) if data.windows == "last" else -(-targets // data.max_len)


def ranges(start: Ints, count: Ints) -> Ints:
    """start[i], start[i] + 1 … start[i] + count[i] - 1, for all i."""
    return np.arange(count.sum()) - np.repeat(np.cumsum(count) - count - start, count)
