"""Whether one model ranks better than another for the same users: the paired bootstrap, and Holm's correction.

Users are what a data set is a sample of, so users are resampled; both models are judged on the same resample, which
removes what makes a user easy or hard for both. The interval is of one trained model against another: how much a
model's figure changes with its seed is not in it.

Legend: U users, R resamples, P p-values.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from data_pipeline.errors import GenattError

Ranks = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

_METRIC = re.compile(r"(ndcg|recall)@([1-9][0-9]*)|mrr")
_CHUNK = 1 << 22  # draws held at one time


@dataclass(frozen=True)
class Difference:
    """A model against a reference, as means over users. low, high: the interval of `difference`."""

    value: float
    reference: float
    difference: float
    standard_error: float
    low: float
    high: float
    p: float

    @property
    def relative(self) -> float:
        """The difference as a share of the reference; NaN where that is 0."""
        return self.difference / self.reference if self.reference else float("nan")


def check_metric(metric: str) -> None:
    """Raises GenattError unless `metric` is a mean over users that ranks decide: ndcg@k, recall@k or mrr."""
    if not _METRIC.fullmatch(metric):
        raise GenattError(
            f"metric {metric!r} cannot be compared user by user: use ndcg@k, recall@k (k = 1, 2, …) or mrr"
        )


def of_users(rank_U: Ranks, metric: str) -> Floats:
    """What each user adds to the mean, from the rank (from 1) of the one target: float64 [U]."""
    check_metric(metric)
    name, _, k = metric.partition("@")
    if name == "mrr":
        return 1.0 / rank_U
    inside = rank_U <= int(k)
    return inside / np.log2(1.0 + rank_U) if name == "ndcg" else inside.astype(np.float64)


def compare(
    rank_U: Ranks,
    reference_U: Ranks,
    metric: str,
    resamples: int = 10_000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Difference:
    """The paired bootstrap over users of the difference of `metric` (Efron and Tibshirani 1993, chapters 13 and 16).

    rank_U, reference_U: ranks of the same users in the same order. The interval is the percentile one; p is two-sided
    and inverts it, 2 · min(P(D* ≤ 0), P(D* ≥ 0)) with one added to both counts of R, so it is never 0 and at most 1
    (Davison and Hinkley 1997, section 4.2). The same seed gives the same figures.
    """
    if len(rank_U) != len(reference_U) or not len(rank_U):
        raise GenattError(
            f"{len(rank_U)} users against {len(reference_U)}: a paired comparison needs the same, at least one"
        )
    value_U, base_U = of_users(rank_U, metric), of_users(reference_U, metric)
    difference_U = value_U - base_U
    mean_R = _resampled_means(difference_U, resamples, seed)
    tail = (1 - confidence) / 2
    low, high = np.quantile(mean_R, [tail, 1 - tail])
    beyond = min(np.count_nonzero(mean_R <= 0), np.count_nonzero(mean_R >= 0))
    return Difference(
        value=float(value_U.mean()),
        reference=float(base_U.mean()),
        difference=float(difference_U.mean()),
        standard_error=float(mean_R.std(ddof=1)),
        low=float(low),
        high=float(high),
        p=min(1.0, 2 * (beyond + 1) / (resamples + 1)),
    )


def holm(p_P: Sequence[float]) -> list[float]:
    """P-values adjusted for their number: p̃_(i) = max_{j ≤ i} min(1, (P − j + 1) p_(j)) of the sorted ones (Holm 1979).

    Rejecting where p̃ ≤ α keeps the chance of any false rejection in the family at α, however the tests depend.
    """
    order = np.argsort(p_P, kind="stable")
    steps = np.minimum(1.0, np.asarray(p_P, np.float64)[order] * np.arange(len(order), 0, -1))
    adjusted = np.empty(len(order))
    adjusted[order] = np.maximum.accumulate(steps)
    return adjusted.tolist()


def _resampled_means(value_U: Floats, resamples: int, seed: int) -> Floats:
    """Means of `resamples` draws of U users with replacement: float64 [R]."""
    draw, users = np.random.default_rng(seed), len(value_U)
    distinct, count = np.unique(value_U, return_counts=True)
    if 8 * len(distinct) <= users:
        # A resample is known by how often it holds each value, which is multinomial: the same law, hundreds of times
        # faster, since metrics with a cutoff have a few dozen differences.
        times = draw.multinomial(users, count / users, resamples)
        return times @ distinct / users
    rows = max(1, _CHUNK // users)
    parts = [
        value_U[draw.integers(0, users, (min(rows, resamples - start), users), dtype=np.int32)].mean(1)
        for start in range(0, resamples, rows)
    ]
    return np.concatenate(parts)
