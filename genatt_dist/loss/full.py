"""Full-softmax cross-entropy over the catalogue without ever holding all logits (MATH §2), for rows that are all here
or of which every rank has a shard.

The gradients are made in the forward pass, chunk by chunk, where the probabilities exist anyway: the loss is linear in
each target's negative log-likelihood, so backward only scales them. Three matrix products in all, as many as the
unchunked loss needs.

Over a sharded table (vocabulary-parallel) every rank scores the targets of all ranks against its own rows. Per chunk
the ranks tell each other their largest score and their sum of exponentials; what one rank's rows do to a state is
summed over ranks at the end.

Legend: N targets (here or, when sharded, of all ranks), V rows of this rank, D width, C targets of a chunk.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from genatt_dist.embedding.exchange import Alone, Ranks, add_rows_, rows_at

# A chunk's block of logits: on the CPU it should stay in cache, on a GPU it should fill the device. With fewer targets
# than that the matrix products would wait for memory.
_LOGITS_BYTES = {"cpu": 16 << 20, "cuda": 128 << 20}
_LEAST_CHUNK = 32


def default_chunk(num_rows: int, device_type: str) -> int:
    """Targets scored at a time against `num_rows` rows, the most that any rank has."""
    return max(_LEAST_CHUNK, _LOGITS_BYTES[device_type] // (4 * num_rows))


def full_loss(
    states_ND: Tensor,
    items_VD: Tensor,
    targets_N: Tensor,
    weight_N: Tensor,
    chunk: int,
    padding: int = 0,
    first_row: int | None = None,
) -> Tensor:
    """Σ_n weight_n · (logsumexp_v o_nv − o_n,target), o = states · itemsᵀ, over this rank's targets: scalar float32.

    Parameters
    ----------
    targets_N
        int64, rows of the table.
    chunk
        Targets scored at a time; the same on every rank.
    padding
        Leading rows of items_VD that are no items.
    first_row
        None where items_VD is the whole table. Else the table's row that this rank's first one is, and the call is a
        collective one. Backward then gives items_VD what the losses of all ranks ask for, in float32, so its scale must
        be the same on all ranks.
    """
    if not torch.is_grad_enabled():
        return (weight_N * full_nll(states_ND, items_VD, targets_N, chunk, padding, first_row)).sum()
    loss: Tensor = _FullLoss.apply(states_ND, items_VD, targets_N, weight_N, chunk, padding, first_row)
    return loss


@torch.no_grad()
def full_nll(
    states_ND: Tensor,
    items_VD: Tensor,
    targets_N: Tensor,
    chunk: int,
    padding: int = 0,
    first_row: int | None = None,
) -> Tensor:
    """Each target's negative log-likelihood: float32 [N], without a gradient. Arguments as of `full_loss`."""
    ranks = Alone() if first_row is None else Ranks.of(len(states_ND), states_ND.device)
    states_ND, place_N = ranks.gather(states_ND), ranks.gather(targets_N) - (first_row or 0) - padding
    items_VD = items_VD[padding:].to(states_ND.dtype)
    _, target_N1 = _targets(states_ND, items_VD, place_N, ranks)
    logits = states_ND.new_empty(min(chunk, len(states_ND)), len(items_VD))
    nll_N1 = torch.empty_like(target_N1)
    for first in range(0, len(states_ND), chunk):
        here = slice(first, first + chunk)
        top_C1, _, sum_C1 = _exponentials(states_ND[here], items_VD, logits)
        nll_N1[here] = ranks.normaliser(top_C1, sum_C1)[1] - target_N1[here]
    return ranks.part(nll_N1).squeeze(1)


class _FullLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        states_ND: Tensor,
        items_VD: Tensor,
        targets_N: Tensor,
        weight_N: Tensor,
        chunk: int,
        padding: int,
        first_row: int | None,
    ) -> Tensor:
        ranks = Alone() if first_row is None else Ranks.of(len(states_ND), states_ND.device)
        grad_table_VD = torch.zeros_like(items_VD, dtype=torch.float32)
        states_ND, place_N = ranks.gather(states_ND), ranks.gather(targets_N) - (first_row or 0) - padding
        items_VD, grad_items_VD = items_VD[padding:].to(states_ND.dtype), grad_table_VD[padding:]
        weight_N1 = ranks.gather(weight_N.float())[:, None]
        own_weight_N1 = ranks.own(weight_N1)
        target_rows_ND, target_N1 = _targets(states_ND, items_VD, place_N, ranks)
        total = torch.zeros((), device=states_ND.device)
        grad_states_ND = torch.empty_like(states_ND)
        logits = states_ND.new_empty(min(chunk, len(states_ND)), len(items_VD))
        for first in range(0, len(states_ND), chunk):
            here = slice(first, first + chunk)
            states_CD = states_ND[here]
            top_C1, exp_CV, sum_C1 = _exponentials(states_CD, items_VD, logits)
            divisor_C1, log_sum_C1 = ranks.normaliser(top_C1, sum_C1)
            total += (own_weight_N1[here] * (log_sum_C1 - target_N1[here])).sum()
            # Probabilities are exp/divisor. Neither that division nor the target's −1 is done on C×V: both are linear,
            # so they go into the narrow factors and, for all chunks at once, to the end.
            exp_CV, share_C1 = exp_CV.to(states_ND.dtype), (weight_N1[here] / divisor_C1).to(states_ND.dtype)
            torch.mm(exp_CV, items_VD, out=grad_states_ND[here]).mul_(share_C1)
            if items_VD.dtype == torch.float32:
                grad_items_VD.addmm_(exp_CV.T, states_CD * share_C1)
            else:  # summed over chunks in float32
                grad_items_VD += exp_CV.T @ (states_CD * share_C1)
        grad_states_ND -= target_rows_ND * weight_N1
        add_rows_(grad_items_VD, place_N, states_ND * weight_N1, alpha=-1)
        grad_states_ND = ranks.scatter_sum(grad_states_ND.float()).to(states_ND.dtype)
        # Not among the saved tensors: those would stay alive while backward hands them on, and so be copied.
        ctx.gradients = grad_states_ND, grad_table_VD if first_row is not None else grad_table_VD.to(items_VD.dtype)
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, None, None, None, None, None]:
        if ctx.gradients is None:
            raise RuntimeError("the full softmax's backward was called twice: its gradients are scaled in place")
        (scale,), (grad_states_ND, grad_table_VD) = grad_outputs, ctx.gradients
        ctx.gradients = None
        return grad_states_ND.mul_(scale), grad_table_VD.mul_(scale), None, None, None, None, None


def _exponentials(states_CD: Tensor, items_VD: Tensor, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Each target's largest score m over these rows, exp(o − m) and its sum: [C, 1], [C, V], [C, 1], in float32."""
    scores_CV = torch.mm(states_CD, items_VD.T, out=logits[: len(states_CD)]).float()
    if not len(items_VD):
        nothing_C1 = states_CD.new_zeros((len(states_CD), 1), dtype=torch.float32)
        return nothing_C1.fill_(float("-inf")), scores_CV, torch.zeros_like(nothing_C1)
    top_C1 = scores_CV.amax(1, keepdim=True)
    exp_CV = scores_CV.sub_(top_C1).exp_()
    return top_C1, exp_CV, exp_CV.sum(1, keepdim=True)


def _targets(states_ND: Tensor, items_VD: Tensor, place_N: Tensor, ranks: Alone | Ranks) -> tuple[Tensor, Tensor]:
    """The targets' rows, zero where another rank holds them, and their scores, which every rank gets: [N, D] and
    float32 [N, 1]. place_N: of the target among these rows, if it is here.
    """
    rows_ND = items_VD[place_N] if isinstance(ranks, Alone) else rows_at(items_VD, place_N)
    return rows_ND, ranks.sum((states_ND * rows_ND).sum(1, keepdim=True).float())
