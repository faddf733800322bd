"""Ranking metrics from exact ranks (EVALUATION protocol: full ranking, one target a user).

Legend: U users, C cutoffs, V items.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

CUTOFFS = (5, 10, 20)


def metrics(rank_U: npt.NDArray[np.int64], shown_CV: npt.NDArray[np.int64]) -> dict[str, float]:
    """Means over users of Recall, NDCG and MRR for one target each, and catalogue coverage.

    rank_U: rank of the target, from 1. shown_CV: how often each item was among the best k, for each cutoff k.
    With one relevant item NDCG@k is 1/log2(1 + rank) inside the cutoff; MRR is over the whole ranking.
    """
    values = {}
    for k, shown_V in zip(CUTOFFS, shown_CV, strict=True):
        inside = rank_U <= k
        values[f"recall@{k}"] = float(inside.mean())
        values[f"ndcg@{k}"] = float((inside / np.log2(1.0 + rank_U)).mean())
        values[f"coverage@{k}"] = float(np.count_nonzero(shown_V) / len(shown_V))
    values["mrr"] = float((1.0 / rank_U).mean())
    return values
