"""Metrics are the textbook formulas on the rank of one target a user."""

import math

import numpy as np
import pytest

from genatt_dist.evaluation.metrics import CUTOFFS, metrics


def test_metrics_equal_plain_loops() -> None:
    draw = np.random.default_rng(0)
    ranks = draw.integers(1, 40, 200)
    shown = draw.integers(0, 3, (len(CUTOFFS), 37))
    found = metrics(ranks, shown)
    for index, k in enumerate(CUTOFFS):
        hits = [int(rank) for rank in ranks if rank <= k]
        assert found[f"recall@{k}"] == pytest.approx(len(hits) / 200)
        assert found[f"ndcg@{k}"] == pytest.approx(sum(1 / math.log2(1 + rank) for rank in hits) / 200)
        assert found[f"coverage@{k}"] == pytest.approx(sum(count > 0 for count in shown[index]) / 37)
    assert found["mrr"] == pytest.approx(sum(1 / rank for rank in ranks.tolist()) / 200)
    assert len(found) == 3 * len(CUTOFFS) + 1


def test_bounds() -> None:
    nothing, everything = np.zeros((3, 9), int), np.ones((3, 9), int)
    best = metrics(np.ones(4, int), everything)
    assert set(best.values()) == {1.0}
    worst = metrics(np.full(4, 10**6), nothing)
    assert all(value <= 1e-6 for value in worst.values())
    edge = metrics(np.array([10, 11]), nothing)
    assert (edge["recall@5"], edge["recall@10"], edge["recall@20"]) == (0.0, 0.5, 1.0)
