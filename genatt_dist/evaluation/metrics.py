"""Ranking metrics from exact ranks (EVALUATION protocol: full ranking, one target a user).

Legend: U users, X cutoffs, V items.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

CUTOFFS = (5, 10, 20)

# By the part of a metric's name before @k.
DEFINITIONS = {
    "recall": "share of users whose target is among their best k",
    "ndcg": "mean over users of 1 / log2(1 + rank of the target) where that is among the best k, else 0",
    "mrr": "mean over users of 1 / rank of the target, over the whole ranking",
    "coverage": "share of the catalogue's items that are in somebody's list of k",
    "cc": "share of the catalogue's categories that an item in somebody's list of k has",
    "f": "harmonic mean of CC@k and (Recall@k + NDCG@k) / 2",
    "ild": "mean over users of 1 - Jaccard of the categories of two items, over pairs of a list of k (items without "
    "categories left out)",
    "gini": "inequality of how often items are in lists of k: 0 = all equally often, near 1 = one item alone",
    "novelty": "mean over places in lists of k of -log2 of the item's share of training interactions (at least one)",
}


def metrics(rank_U: npt.NDArray[np.int64], shown_XV: npt.NDArray[np.integer]) -> dict[str, float]:
    """Means over users of Recall, NDCG and MRR for one target each, and catalogue coverage.

    rank_U: rank of the target, from 1. shown_XV: how often each item was among the best k, for each cutoff k.
    With one relevant item NDCG@k is 1/log2(1 + rank) inside the cutoff; MRR is over the whole ranking.
    """
    values = {}
    for k, shown_V in zip(CUTOFFS, shown_XV, strict=True):
        inside = rank_U <= k
        values[f"recall@{k}"] = float(inside.mean())
        values[f"ndcg@{k}"] = float((inside / np.log2(1.0 + rank_U)).mean())
        values[f"coverage@{k}"] = float(np.count_nonzero(shown_V) / len(shown_V))
    values["mrr"] = float((1.0 / rank_U).mean())
    return values
