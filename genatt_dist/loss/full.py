"""Full-softmax cross-entropy over the catalogue without ever holding all logits (MATH §2).

The gradients are made in the forward pass, chunk by chunk, where the probabilities exist anyway: the loss is linear in
each target's negative log-likelihood, so backward only scales them. Three matrix products in all, as many as the
unchunked loss needs.

Legend: N targets, V items, D width, C targets of a chunk.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def full_loss(states_ND: Tensor, items_VD: Tensor, targets_N: Tensor, weight_N: Tensor, chunk: int) -> Tensor:
    """Σ_n weight_n · (logsumexp_v o_nv − o_n,target), o = states · itemsᵀ. targets_N: int64 rows of items_VD. Scalar
    float32.
    """
    if not torch.is_grad_enabled():
        return (weight_N * full_nll(states_ND, items_VD, targets_N, chunk)).sum()
    loss: Tensor = _FullLoss.apply(states_ND, items_VD, targets_N, weight_N, chunk)
    return loss


@torch.no_grad()
def full_nll(states_ND: Tensor, items_VD: Tensor, targets_N: Tensor, chunk: int) -> Tensor:
    """Each target's negative log-likelihood: float32 [N], without a gradient."""
    parts = []
    for states_CD, targets_C in zip(states_ND.split(chunk), targets_N.split(chunk), strict=True):
        logits_CV = (states_CD @ items_VD.T).float()
        parts.append(logits_CV.logsumexp(-1) - logits_CV.gather(1, targets_C[:, None]).squeeze(1))
    return torch.cat(parts)


class _FullLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, states_ND: Tensor, items_VD: Tensor, targets_N: Tensor, weight_N: Tensor, chunk: int
    ) -> Tensor:
        weight_N1, target_rows_ND = weight_N[:, None].float(), items_VD[targets_N]
        target_N1 = (states_ND * target_rows_ND).sum(1, keepdim=True).float()
        total = torch.zeros((), device=states_ND.device)
        grad_states_ND = torch.empty_like(states_ND)
        grad_items_VD = torch.zeros_like(items_VD, dtype=torch.float32)
        logits = states_ND.new_empty(min(chunk, len(states_ND)), len(items_VD))
        for first in range(0, len(states_ND), chunk):
            here = slice(first, first + chunk)
            states_CD = states_ND[here]
            scores_CV = torch.mm(states_CD, items_VD.T, out=logits[: len(states_CD)]).float()
            top_C1 = scores_CV.amax(1, keepdim=True)
            exp_CV = scores_CV.sub_(top_C1).exp_()
            sum_C1 = exp_CV.sum(1, keepdim=True)
            total += (weight_N1[here] * (top_C1 + sum_C1.log() - target_N1[here])).sum()
            # Probabilities are exp/sum. Neither that division nor the target's −1 is done on C×V: both are linear, so
            # they go into the narrow factors and, for all chunks at once, to the end.
            exp_CV, share_C1 = exp_CV.to(states_ND.dtype), (weight_N1[here] / sum_C1).to(states_ND.dtype)
            torch.mm(exp_CV, items_VD, out=grad_states_ND[here]).mul_(share_C1)
            if items_VD.dtype == torch.float32:
                grad_items_VD.addmm_(exp_CV.T, states_CD * share_C1)
            else:  # summed over chunks in float32
                grad_items_VD += exp_CV.T @ (states_CD * share_C1)
        grad_states_ND -= target_rows_ND * weight_N1
        grad_items_VD.index_add_(0, targets_N, states_ND * weight_N1, alpha=-1)
        ctx.save_for_backward(grad_states_ND, grad_items_VD.to(items_VD.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        (scale,) = grad_outputs
        grad_states_ND, grad_items_VD = ctx.saved_tensors
        return grad_states_ND * scale, grad_items_VD * scale, None, None, None
