"""A law of sequences whose exact predictor is known: each copies the item k steps back, and k is hidden (MATH §7.8).

Legend: B sequences, M items of each, K intents.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class CopyLaw:
    """Item m of a sequence is item m − k with probability `copy`; else, and where m < k, it is uniform over 1..V.

    num_items: V. intents: the k there are, all equally likely; a sequence keeps its own and never tells it.
    """

    num_items: int = 50
    intents: tuple[int, ...] = (1, 3)
    copy: float = 0.8

    def draw(self, count: int, length: int, seed: int) -> Tensor:
        """`count` independent sequences of `length` items: int64 [B, M]."""
        generator = torch.Generator().manual_seed(seed)
        items_BM = torch.randint(1, self.num_items + 1, (count, length), generator=generator)
        copied_BM = torch.rand(count, length, generator=generator) < self.copy
        intent_B = torch.tensor(self.intents)[torch.randint(len(self.intents), (count,), generator=generator)]
        for m in range(1, length):
            source_B = items_BM[torch.arange(count), (m - intent_B).clamp(min=0)]
            items_BM[:, m] = torch.where(copied_BM[:, m] & (intent_B <= m), source_B, items_BM[:, m])
        return items_BM

    def bayes_nll(self, items_BM: Tensor) -> Tensor:
        """−log p(x_m | x_0 … x_{m−1}) of every item but the first: float64 [B, M − 1].

        p(x_m | x_<m) = Σ_k p(k | x_<m) p(x_m | x_<m, k) = Σ_k p(x_≤m | k) / Σ_k p(x_<m | k): the posterior over k is in
        the quotient. No predictor of the history has a lower expected loss.
        """
        log_KBM = torch.stack([self._log_conditional(items_BM, k) for k in self.intents])
        joint_BM = log_KBM.cumsum(-1).logsumexp(0) - math.log(len(self.intents))
        return -joint_BM.diff(dim=-1)

    def _log_conditional(self, items_BM: Tensor, k: int) -> Tensor:
        """log p(x_m | x_<m, k): float64 [B, M]"""
        uniform = 1 / self.num_items
        copied_BM = items_BM[:, k:] == items_BM[:, :-k]
        later_BM = self.copy * copied_BM.double() + (1 - self.copy) * uniform
        first_BM = later_BM.new_full((len(items_BM), k), uniform)
        return torch.cat((first_BM, later_BM), 1).log()
