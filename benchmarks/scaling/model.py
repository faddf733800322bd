"""A cost model of the step: α + β·bytes of each collective, and seconds of what a rank computes. Pure numpy.

Computing costs a fixed time for each floating-point operation, byte and operation that the plan counts (`features`),
none of them negative, fitted by least squares of the relative error. A machine whose cores are all busy has times of
its own: those are fitted to processes that run at once and share nothing. What ranks wait for each other's unequal
steps is not in the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
TOLERANCE = 0.15


def nonnegative(columns_NK: Floats, seconds_N: Floats) -> Floats:
    """The x ≥ 0 of least relative error of columns·x against seconds [K]: Lawson and Hanson's active set (1974)."""
    scaled_NK = columns_NK / seconds_N[:, None]
    norms_K = np.linalg.norm(scaled_NK, axis=0)
    norms_K[norms_K == 0] = 1.0
    scaled_NK, ones_N = scaled_NK / norms_K, np.ones(len(seconds_N))
    x_K, free_K = np.zeros(scaled_NK.shape[1]), np.zeros(scaled_NK.shape[1], np.bool_)
    for _ in range(3 * len(x_K)):
        gain_K = scaled_NK.T @ (ones_N - scaled_NK @ x_K)
        gain_K[free_K] = -np.inf
        if gain_K.max() <= 1e-12 * len(ones_N):
            break
        free_K[gain_K.argmax()] = True
        while True:
            solved_K = np.zeros_like(x_K)
            solved_K[free_K] = np.linalg.lstsq(scaled_NK[:, free_K], ones_N, rcond=None)[0]
            below_K = free_K & (solved_K <= 0)
            if not below_K.any():
                x_K = solved_K
                break
            step = (x_K[below_K] / np.maximum(x_K[below_K] - solved_K[below_K], 1e-300)).min()
            x_K = x_K + step * (solved_K - x_K)
            free_K &= x_K > 1e-14
            x_K[~free_K] = 0.0
    return x_K / norms_K


@dataclass(frozen=True)
class Line:
    """Seconds of a collective: alpha + beta · bytes."""

    alpha: float
    beta: float

    def __call__(self, size: float) -> float:
        return self.alpha + self.beta * size

    @staticmethod
    def fit(sizes: Sequence[float], seconds: Sequence[float]) -> Line:
        """Of least relative error; neither number is negative."""
        columns_N2 = np.stack([np.ones(len(sizes)), np.asarray(sizes, np.float64)], 1)
        alpha, beta = nonnegative(columns_N2, np.asarray(seconds, np.float64))
        return Line(float(alpha), float(beta))


@dataclass(frozen=True)
class Measured:
    """Collectives between `world_size` ranks as they were timed (`plan.cost.Collectives`)."""

    world_size: int
    lines: Mapping[str, Line]

    def all_reduce(self, size: float) -> float:
        return self.lines["all_reduce"](size)

    def all_gather(self, size: float) -> float:
        return self.lines["all_gather"](size)

    def all_to_all(self, size: float) -> float:
        return self.lines["all_to_all"](size)

    @staticmethod
    def fit(world_size: int, rows: Sequence[Mapping[str, Any]]) -> Measured:
        """rows: of `collectives.timed`."""
        kinds = {str(row["kind"]) for row in rows}
        timed = {kind: [row for row in rows if row["kind"] == kind] for kind in kinds}
        return Measured(
            world_size,
            {
                kind: Line.fit([row["bytes"] for row in some], [row["seconds"] for row in some])
                for kind, some in timed.items()
            },
        )


@dataclass(frozen=True)
class Model:
    """weights: seconds of one of each of `features.NAMES`, by how many cores are busy. links: by number of ranks."""

    weights: Mapping[int, Floats]
    links: Mapping[int, Measured]

    @staticmethod
    def fit(
        amounts: Mapping[int, Sequence[Floats]],
        seconds: Mapping[int, Sequence[float]],
        collectives: Mapping[int, Sequence[Mapping[str, Any]]],
    ) -> Model:
        """amounts, seconds: of the rows to fit to, by busy cores. collectives: timings by number of ranks."""
        weights = {busy: nonnegative(np.stack(rows), np.asarray(seconds[busy])) for busy, rows in amounts.items()}
        return Model(weights, {ranks: Measured.fit(ranks, rows) for ranks, rows in collectives.items()})

    def computing(self, amounts: Floats, busy: int) -> float:
        """Seconds of what one rank computes while `busy` cores are."""
        return float(amounts @ self.weights[busy])
