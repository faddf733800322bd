"""A cost model of the step: α + β·bytes of each collective, and seconds of what a rank computes. Pure numpy.

Computing costs a fixed time for each floating-point operation, byte and operation that the plan counts (`features`),
none of them negative, fitted by least squares of the relative error. A machine whose cores are all busy has times of
its own: those are fitted to processes that run at once and share nothing. Their steps are unequal, and ranks that meet
in every step wait for the slowest: its expected lead, were steps of R ranks independent and normal. Ranks meet more
than once in a step, so that this is the least they wait.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from statistics import NormalDist, fmean
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
TOLERANCE = 0.15
_QUANTILES = 10_000
_TENTHS = 2 * NormalDist().inv_cdf(0.9)  # standard deviations between the first and the last tenth of a normal


@cache
def lead(ranks: int) -> float:
    """Standard deviations by which the slowest of `ranks` independent normal steps exceeds their mean, on average."""
    chances = ((number + 0.5) / _QUANTILES for number in range(_QUANTILES))
    return fmean(NormalDist().inv_cdf(chance ** (1 / ranks)) for chance in chances) if ranks > 1 else 0.0


def deviation(rows: Sequence[Mapping[str, Any]]) -> float:
    """Standard deviation of one process's step over its time, the mean of rows of independent processes. Their steps
    are means over `ranks` processes, which vary less by the root of that. 0 where no row has more than one step.
    """
    spreads = [
        row["ranks"] ** 0.5 * (row["ms_p90"] - row["ms_p10"]) / _TENTHS / row["ms_per_step"]
        for row in rows
        if row["ms_p10"] is not None
    ]
    return fmean(spreads) if spreads else 0.0


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
    """weights: seconds of one of each of `features.NAMES`, by how many cores are busy. links: by number of ranks.
    deviations: of a step over its time, by how many cores are busy; none where nothing waits.
    """

    weights: Mapping[int, Floats]
    links: Mapping[int, Measured]
    deviations: Mapping[int, float]

    @staticmethod
    def fit(
        amounts: Mapping[int, Sequence[Floats]],
        seconds: Mapping[int, Sequence[float]],
        collectives: Mapping[int, Sequence[Mapping[str, Any]]],
        deviations: Mapping[int, float] | None = None,
    ) -> Model:
        """amounts, seconds: of the rows to fit to, by busy cores. collectives: timings by number of ranks."""
        weights = {busy: nonnegative(np.stack(rows), np.asarray(seconds[busy])) for busy, rows in amounts.items()}
        links = {ranks: Measured.fit(ranks, rows) for ranks, rows in collectives.items()}
        return Model(weights, links, deviations or {})

    def saved(self, names: Sequence[str]) -> dict[str, Any]:
        """What a file of results holds of it; `read` takes it back. names: of the weights."""
        return {
            "seconds_of_one": {
                str(busy): dict(zip(names, map(float, weights), strict=True)) for busy, weights in self.weights.items()
            },
            "deviation_of_a_step": {str(busy): float(f"{each:.4g}") for busy, each in self.deviations.items()},
            "alpha_beta": {
                str(ranks): {kind: {"alpha": line.alpha, "beta": line.beta} for kind, line in link.lines.items()}
                for ranks, link in self.links.items()
            },
        }

    @staticmethod
    def read(saved: Mapping[str, Any], names: Sequence[str]) -> Model:
        """Raises KeyError where something is missing."""
        return Model(
            {int(busy): np.array([each[name] for name in names]) for busy, each in saved["seconds_of_one"].items()},
            {
                int(ranks): Measured(int(ranks), {kind: Line(**line) for kind, line in lines.items()})
                for ranks, lines in saved["alpha_beta"].items()
            },
            {int(busy): float(each) for busy, each in saved["deviation_of_a_step"].items()},
        )

    def computing(self, amounts: Floats, busy: int) -> float:
        """Seconds of what one rank computes while `busy` cores are."""
        return float(amounts @ self.weights[busy])

    def waiting(self, computing: float, world_size: int) -> float:
        """Seconds that a rank which computes so long waits for the slowest of its process group."""
        return computing * lead(world_size) * self.deviations.get(world_size, 0.0)
