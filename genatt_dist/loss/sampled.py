"""Losses over a few candidates: sampled softmax with logQ correction, and binary cross-entropies.

Sampled softmax estimates the softmax's denominator Σ_j exp(o_j) without bias: the target is there for certain, every
other item j is drawn with expected count K·q_j and enters as exp(o_j − log K·q_j) (Bengio & Senécal 2008; "logQ", Yi
et al. 2019). Draws that hit the target are masked, since it is counted already.

Legend: N targets, K negatives (shared by all targets, or a target's own), U rows that own negatives are among, D width,
C targets of a chunk.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

# Rows of the own negatives of some targets, by device: they stay in cache on the CPU, and fill a GPU.
ROWS_BYTES = {"cpu": 4 << 20, "cuda": 128 << 20}


def sampled_nll(target_N: Tensor, negative_NK: Tensor, hit_NK: Tensor, log_expected: Tensor) -> Tensor:
    """Each target's negative log-likelihood under the sampled softmax: float32 [N].

    target_N, negative_NK: float32 scores. hit_NK: whether the negative is the target. log_expected: log of each
    negative's expected count among a target's draws, log K·q: [K] or [N, K].
    """
    negative_NK = (negative_NK - log_expected).masked_fill(hit_NK, float("-inf"))
    return torch.logaddexp(target_N, negative_NK.logsumexp(-1)) - target_N


def binary_nll(target_N: Tensor, negative_NK: Tensor, hit_NK: Tensor, beta: float) -> Tensor:
    """−β log σ(o_target) − Σ_k log(1 − σ(o_k)): float32 [N]. A negative that is the target counts nothing.

    β = 1 and K = 1 is SASRec's original loss. Other β are gBCE's (Petrov & Macdonald 2023), whose division by K + 1 is
    left out: it only scales the learning rate, and without it gBCE is the original loss where both are the same.
    """
    return beta * F.softplus(-target_N) + (F.softplus(negative_NK) * ~hit_NK).sum(-1)


def gbce_beta(num_negatives: int, num_items: int, calibration: float) -> float:
    """gBCE's β = α·(t(1 − 1/α) + 1/α), α = K/(V − 1) the share of the other items that are drawn."""
    alpha = num_negatives / max(1, num_items - 1)
    return alpha * (calibration * (1 - 1 / alpha) + 1 / alpha)


def own_scores(states_ND: Tensor, rows_UD: Tensor, index_NK: Tensor) -> Tensor:
    """Scores of each target's own negatives, states_n · rows[index_nk]: [N, K], differentiable.

    N×K×D numbers never exist: rows are gathered for some targets at a time, and in backward again.
    """
    scores_NK: Tensor = _OwnScores.apply(states_ND, rows_UD, index_NK)
    return scores_NK


class _OwnScores(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states_ND: Tensor, rows_UD: Tensor, index_NK: Tensor) -> Tensor:
        ctx.save_for_backward(states_ND, rows_UD, index_NK)
        scores_NK = states_ND.new_empty(index_NK.shape)
        for here in _chunks(index_NK, rows_UD):
            torch.bmm(_gathered(rows_UD, index_NK[here]), states_ND[here, :, None], out=scores_NK[here, :, None])
        return scores_NK

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, None]:
        (grad_NK,) = grad_outputs
        states_ND, rows_UD, index_NK = ctx.saved_tensors
        grad_states_ND = torch.empty_like(states_ND)
        grad_rows_UD = torch.zeros_like(rows_UD, dtype=torch.float32)
        for here in _chunks(index_NK, rows_UD):
            rows_CKD, grad_C1K = _gathered(rows_UD, index_NK[here]), grad_NK[here, None, :]
            torch.bmm(grad_C1K, rows_CKD, out=grad_states_ND[here, None, :])
            by_row_CKD = torch.mul(grad_NK[here, :, None], states_ND[here, None, :], out=rows_CKD)
            grad_rows_UD.index_add_(0, index_NK[here].flatten(), by_row_CKD.flatten(0, 1).float())
        return grad_states_ND, grad_rows_UD.to(rows_UD.dtype), None


def _gathered(rows_UD: Tensor, index_CK: Tensor) -> Tensor:
    return rows_UD.index_select(0, index_CK.flatten()).view(*index_CK.shape, -1)


def _chunks(index_NK: Tensor, rows_UD: Tensor) -> list[slice]:
    size = ROWS_BYTES[rows_UD.device.type] // (index_NK.shape[1] * rows_UD.shape[1] * rows_UD.element_size())
    return [slice(first, first + max(1, size)) for first in range(0, len(index_NK), max(1, size))]
