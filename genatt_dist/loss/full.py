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
        total = torch.zeros((), device=states_ND.device)
        grad_states_ND = torch.empty_like(states_ND)
        grad_items_VD = torch.zeros_like(items_VD)
        for first in range(0, len(states_ND), chunk):
            here = slice(first, first + chunk)
            states_CD, targets_C, weight_C1 = states_ND[here], targets_N[here, None], weight_N[here, None].float()
            logits_CV = (states_CD @ items_VD.T).float()
            target_C1 = logits_CV.gather(1, targets_C)
            top_C1, top_item_C1 = logits_CV.max(1, keepdim=True)
            grad_CV = torch.softmax(logits_CV, 1)
            del logits_CV
            # logsumexp from what is at hand: the largest probability is exp(top − logsumexp), and at least 1/V.
            nll_C1 = top_C1 - grad_CV.gather(1, top_item_C1).log() - target_C1
            total += (weight_C1 * nll_C1).sum()
            grad_CV.scatter_add_(1, targets_C, grad_CV.new_full((), -1.0).expand_as(targets_C))
            # The weights are equal most of the time; they are multiplied into the narrow factors, not into C×V.
            grad_CV = grad_CV.to(states_ND.dtype)
            torch.mm(grad_CV, items_VD, out=grad_states_ND[here])
            grad_states_ND[here] *= weight_C1.to(states_ND.dtype)
            grad_items_VD.addmm_(grad_CV.T, states_CD * weight_C1.to(states_ND.dtype))
        ctx.save_for_backward(grad_states_ND, grad_items_VD)
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        (scale,) = grad_outputs
        grad_states_ND, grad_items_VD = ctx.saved_tensors
        return (
            grad_states_ND * scale.to(grad_states_ND.dtype),
            grad_items_VD * scale.to(grad_items_VD.dtype),
            None,
            None,
            None,
        )
