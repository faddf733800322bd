"""Which items stand in for the catalogue: keyed draws of negatives and the expected count of each.

Draws are with replacement and keyed by the step alone, so every rank of a step draws the same ones.
Legend: V items (ids 1..V), K draws.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from genatt_dist.attention.noise import Purpose, bits, derive, integers


class Proposal:
    """A law q over the items 1..V.

    kind: `uniform`; `log_uniform` (Zipf-like in the rank by training counts); `popularity` (training counts
    plus one, so that no item has q = 0 and the correction stays unbiased).
    """

    def __init__(self, kind: str, num_items: int, popularity_V: Tensor, device: torch.device) -> None:
        rank_V = 1 + popularity_V.argsort(descending=True, stable=True).argsort().double()
        weight_V = {
            "uniform": lambda: torch.ones_like(rank_V),
            "log_uniform": lambda: torch.log1p(1 / rank_V),
            "popularity": lambda: popularity_V.double() + 1,
        }[kind]()
        self.log_q_V = (weight_V / weight_V.sum()).log().float().to(device)
        self.cumulative_V = (weight_V.cumsum(0) / weight_V.sum()).to(device)

    def draw(self, key: int, count: int) -> tuple[Tensor, Tensor]:
        """K = `count` ids (int64 [K]) and the log of each one's expected count among them, log K·q (float32 [K])."""
        device = self.cumulative_V.device
        words_K = bits(torch.tensor([key], device=device), count)[0]
        uniform_K = ((words_K >> 11) & ((1 << 53) - 1)).double() * 2.0**-53
        index_K = torch.searchsorted(self.cumulative_V, uniform_K, right=True).clamp_(max=len(self.cumulative_V) - 1)
        return index_K + 1, self.log_q_V[index_K] + math.log(count)


def shared_key(seed: int, step: int) -> int:
    """The key of the negatives that a whole global batch shares."""
    key = derive(seed, int(Purpose.NEGATIVE), step)
    assert isinstance(key, int)
    return key


def uniform_per_token(key_N: Tensor, num_items: int) -> Tensor:
    """One uniform item id a key: int64 [N]."""
    return 1 + integers(key_N, 1, num_items).squeeze(-1)
