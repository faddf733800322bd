"""Which items stand in for the catalogue: keyed draws of negatives and the expected count of each.

Draws are with replacement. Those that a global batch shares are keyed by the step alone, so every rank of a step draws
the same ones; a target's own ones are keyed by its token.
Legend: V items (ids 1..V), N keys, K draws a key, G targets of all ranks.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from genatt_dist.attention.noise import Purpose, bits, derive, integers


class Proposal:
    """A law q over the items 1..V.

    kind: `uniform`; `log_uniform` (Zipf-like in the rank by training counts); `popularity` (training counts
    plus one, so that no item has q = 0 and the correction stays unbiased); `in_batch` (training counts, the law of the
    targets).
    """

    def __init__(self, kind: str, num_items: int, popularity_V: Tensor, device: torch.device) -> None:
        self._num_items = num_items
        if kind == "uniform":  # no tables: with millions of items they would take as much as a shard of rows
            self._cumulative_V = None
            self.log_q_V = torch.full((1,), -math.log(num_items), device=device).expand(num_items)
            return
        weight_V = {"log_uniform": _zipf, "popularity": _smoothed, "in_batch": _counted}[kind](popularity_V)
        self.log_q_V = (weight_V / weight_V.sum()).log().float().to(device)
        self._cumulative_V = (weight_V.cumsum(0) / weight_V.sum()).to(device)

    def draw(self, key_N: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """K = `count` ids for each key (int64 [N, K]) and the log of each one's expected count among its key's,
        log K·q (float32 [N, K]).
        """
        words_NK = bits(key_N, count)
        uniform_NK = ((words_NK >> 11) & ((1 << 53) - 1)).double() * 2.0**-53
        if self._cumulative_V is None:
            index_NK = (uniform_NK * self._num_items).long()
        else:
            index_NK = torch.searchsorted(self._cumulative_V, uniform_NK, right=True)
        index_NK.clamp_(max=self._num_items - 1)
        return index_NK + 1, self.log_q_V[index_NK] + math.log(count)

    def of_targets(self, targets_G: Tensor, logq: bool) -> tuple[Tensor, Tensor]:
        """The targets of a global batch as G draws: their ids, each once and sorted (int64 [K]), and what their scores
        are lowered by (float32 [K]).

        An item that is drawn m times stands once, with log m added to its score: the sum of exponentials is the same,
        and in an order that does not depend on how the batch lies on the ranks.
        """
        ids_K, times_K = targets_G.unique(return_counts=True)
        lowered_K = -times_K.float().log()
        return ids_K, lowered_K + self.log_q_V[ids_K - 1] + math.log(len(targets_G)) if logq else lowered_K


def shared_key(seed: int, step: int, device: torch.device) -> Tensor:
    """The key of the negatives that a whole global batch shares: int64 [1]."""
    key = derive(seed, int(Purpose.NEGATIVE), step)
    assert isinstance(key, int)
    return torch.tensor([key], device=device)


def uniform_ids(key_N: Tensor, count: int, num_items: int) -> Tensor:
    """`count` uniform item ids a key: int64 [N, K]."""
    return 1 + integers(key_N, count, num_items)


def _zipf(popularity_V: Tensor) -> Tensor:
    """log(1 + 1/rank), rank 1 the most popular: float64 [V]."""
    return torch.log1p(1 / (1 + popularity_V.argsort(descending=True, stable=True).argsort()).double())


def _smoothed(popularity_V: Tensor) -> Tensor:
    return popularity_V.double() + 1


def _counted(popularity_V: Tensor) -> Tensor:
    return popularity_V.double().clamp(min=1)  # a target was counted at least once
