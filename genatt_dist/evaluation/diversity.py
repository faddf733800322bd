"""What the lists of all users hold together: exposure of items and categories, novelty, and distance inside a list.

Everything comes from counts, which add up over batches and ranks to the same whole numbers however users are divided:
how often an item is among the best k, and the sum of users' distances in fixed point. Memory is that of the catalogue.
Definitions: `metrics.DEFINITIONS`. Legend: B users, V items, K categories, X cutoffs, k length of a list, P pairs of a
place and a category, Q distinct pairs of a user and a category, L categories of one user's list, R pairs of places.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from genatt_dist.evaluation.categories import Categories
from genatt_dist.evaluation.metrics import CUTOFFS

Counts = npt.NDArray[np.int64]

_UNIT = 1 << 32  # of distances in fixed point: whole numbers add up to the same sum in any order
_BLOCK = 1 << 22  # numbers of the matrix of lists compared in one go
_NO_ITEM = 0


class Lists:
    """Adds up this rank's lists of k items; `metrics` puts all ranks' together."""

    def __init__(self, popularity: Counts, categories: Categories | None, device: torch.device) -> None:
        """popularity: int [V + 1], interactions of each item in the training part."""
        self._popularity, self._categories = popularity, categories
        self._shown_XV = torch.zeros((len(CUTOFFS), len(popularity)), dtype=torch.int32, device=device)
        length, most = max(CUTOFFS), int(categories.first.diff().max()) if categories is not None else 0
        self._users = max(1, _BLOCK // (length * length * max(1, most)))  # that many lists are compared in one go
        self._distance_X2 = torch.zeros((len(CUTOFFS), 2), dtype=torch.int64, device=device)

    def add(self, top_Bk: Tensor) -> None:
        """Lists of max(CUTOFFS) ids, best first; id 0 is no item."""
        for shown_V, k in zip(self._shown_XV, CUTOFFS, strict=True):
            top = top_Bk[:, :k].flatten()
            shown_V.index_add_(0, top, torch.ones_like(top, dtype=torch.int32))
        if self._categories is not None and len(top_Bk):
            for part_Bk in top_Bk.split(self._users):
                self._distance_X2 += _distances(part_Bk, self._categories)

    def shown(self, total: Callable[[Tensor], Tensor] = torch.Tensor.clone) -> npt.NDArray[np.int32]:
        """How often each item is in a list, for each cutoff, over all ranks: [X, V]. Collective."""
        counts: npt.NDArray[np.int32] = total(self._shown_XV)[:, _NO_ITEM + 1 :].cpu().numpy()
        return counts

    def metrics(
        self, accuracy: dict[str, float], shown_XV: npt.NDArray[np.int32], total: Callable[[Tensor], Tensor]
    ) -> dict[str, float]:
        """What the lists say beside catalogue coverage; accuracy: what F weighs CC against. Collective."""
        values = {}
        for k, shown_V in zip(CUTOFFS, shown_XV, strict=True):
            values[f"gini@{k}"] = gini(shown_V)
            values[f"novelty@{k}"] = novelty(shown_V, self._popularity[1:])
        if self._categories is None:
            return values
        distances = total(self._distance_X2).tolist()
        for k, shown_V, (distance, users) in zip(CUTOFFS, shown_XV, distances, strict=True):
            covered = category_coverage(shown_V, self._categories)
            quality = (accuracy[f"recall@{k}"] + accuracy[f"ndcg@{k}"]) / 2
            values[f"cc@{k}"] = covered
            values[f"f@{k}"] = 2 * quality * covered / (quality + covered) if quality + covered else 0.0
            values[f"ild@{k}"] = distance / _UNIT / users if users else 0.0
        return values


def gini(shown_V: npt.NDArray[np.integer]) -> float:
    """Σ_i (2i − V − 1) x_(i) / (V Σ x) of counts x_(1) ≤ … ≤ x_(V): 0 = all equal, (V − 1)/V = one has all.

    From a histogram of the counts, which are few: the places of equal counts are consecutive.
    """
    number_N = np.bincount(shown_V)
    value_N = np.arange(len(number_N))
    last_N = np.cumsum(number_N)
    places_N = number_N * (2 * last_N - number_N + 1)  # Σ 2i over the places of a value
    size, total = len(shown_V), int(number_N @ value_N)
    return float(value_N @ (places_N - number_N * (size + 1)) / (size * total)) if total else 0.0


def novelty(shown_V: npt.NDArray[np.integer], popularity_V: Counts) -> float:
    """Mean over the places of all lists of −log2 of the item's share of training interactions; an item without any
    counts as with one.
    """
    total = int(shown_V.sum(dtype=np.int64))
    information_V = np.log2(max(1, int(popularity_V.sum()))) - np.log2(np.maximum(popularity_V, 1))
    return float(shown_V @ information_V / total) if total else 0.0


def category_coverage(shown_V: npt.NDArray[np.integer], categories: Categories) -> float:
    """Share of the categories that an item in somebody's list has."""
    ids = torch.from_numpy(np.flatnonzero(shown_V) + 1).to(categories.first.device)
    covered_K = torch.zeros(len(categories.names), dtype=torch.bool, device=ids.device)
    covered_K[categories.of(ids)[1]] = True
    return float(covered_K.sum()) / len(categories.names) if categories.names else 0.0


def _distances(top_Bk: Tensor, categories: Categories) -> Tensor:
    """For each cutoff the sum of users' mean 1 − Jaccard over pairs of their list (in _UNITs), and how many users have
    such a pair: int64 [X, 2]. Nothing is known of an item without category: its pairs are left out.
    """
    users, length = top_Bk.shape
    place_P, category_P = categories.of(top_Bk.flatten())
    user_P = place_P // length
    # The categories of a list are numbered from 0 for each user: a matrix of all K would not fit for large K.
    key_Q, found_P = torch.unique(user_P * len(categories.names) + category_P, return_inverse=True)
    number_B = torch.bincount(key_Q // max(1, len(categories.names)), minlength=users)
    column_P = found_P - (number_B.cumsum(0) - number_B)[user_P]
    member = torch.zeros(users * length, int(number_B.max()), device=top_Bk.device)
    member[place_P, column_P] = 1
    member_BkL = member.view(users, length, -1)
    # Pairs by the later place of the two: those of the best k are the first k (k − 1) / 2.
    later_R, earlier_R = torch.tril_indices(length, length, -1, device=top_Bk.device)
    common_BR = (member_BkL @ member_BkL.transpose(1, 2)).flatten(1)[:, later_R * length + earlier_R]
    size_Bk = member_BkL.sum(-1)
    later_BR, earlier_BR = size_Bk[:, later_R], size_Bk[:, earlier_R]
    known_BR = (later_BR > 0) & (earlier_BR > 0)
    share_BR = common_BR.double() / (later_BR + earlier_BR - common_BR).clamp_(min=1)  # of whole numbers: exact
    distance_BR = ((1 - share_BR) * _UNIT).round_().long() * known_BR
    sums = []
    for k in CUTOFFS:
        pairs = k * (k - 1) // 2
        known_B = known_BR[:, :pairs].sum(1)
        mean_B = distance_BR[:, :pairs].sum(1).double() / known_B.clamp(min=1)
        sums.append(torch.stack((mean_B.round().long().sum(), (known_B > 0).sum())))
    return torch.stack(sums)
