"""Losses over a few candidates: sampled softmax with logQ correction, and binary cross-entropy with one negative.

Sampled softmax estimates the softmax's denominator Σ_j exp(o_j) without bias: the target is there for certain, every
other item j is drawn with expected count K·q_j and enters as exp(o_j − log K·q_j) (Bengio & Senécal 2008; "logQ", Yi
et al. 2019). Draws that hit the target are masked, since it is counted already.

Legend: N targets, K shared negatives, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def sampled_nll(
    states_ND: Tensor,
    target_rows_ND: Tensor,
    negative_rows_KD: Tensor,
    targets_N: Tensor,
    negatives_K: Tensor,
    log_expected_K: Tensor,
) -> Tensor:
    """Each target's negative log-likelihood under the sampled softmax: float32 [N].

    targets_N, negatives_K: int64 item ids. log_expected_K: log of each negative's expected count among the draws, log
    K·q.
    """
    target_N = (states_ND * target_rows_ND).sum(-1).float()
    negative_NK = (states_ND @ negative_rows_KD.T).float() - log_expected_K
    negative_NK = negative_NK.masked_fill(targets_N[:, None] == negatives_K, float("-inf"))
    return torch.logaddexp(target_N, negative_NK.logsumexp(-1)) - target_N


def bce_nll(
    states_ND: Tensor, target_rows_ND: Tensor, negative_rows_ND: Tensor, targets_N: Tensor, negatives_N: Tensor
) -> Tensor:
    """SASRec's original loss, −log σ(o_target) − log(1 − σ(o_negative)): float32 [N]. A negative that is the target
    counts nothing.
    """
    target_N = (states_ND * target_rows_ND).sum(-1).float()
    negative_N = (states_ND * negative_rows_ND).sum(-1).float()
    return F.softplus(-target_N) + F.softplus(negative_N) * (targets_N != negatives_N)
