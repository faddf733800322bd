"""From a generated row g to its logits G, and the values beside it (MATH §3): κ, keys, relative bias, projections.

Legend: N real tokens, M rows that are made, D hidden width d, H heads, E = d/H, R factor rank r, K entries of a row g.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from genatt_dist.attention.base import Learned, Logits, Rows, linear, split_heads
from genatt_dist.attention.options import DecodedAttention
from genatt_dist.config import ModelConfig


class GeneratedLogits(nn.Module):
    """G_ij = κ·U_i·V_j/√r + b_{i−j} with V_j = W_v[S_j; X_j] (`factor`), or G_ij = κ·g_{i,i−j} (`matrix`).

    κ is a learned scale per head, initially 1, after any normalisation of g; b is learned per head, initially 0;
    `query_projection` adds x W_Q to U.
    """

    def __init__(self, model: ModelConfig, attention: DecodedAttention, max_len: int) -> None:
        super().__init__()
        d, self.heads, factor = model.hidden_size, model.num_heads, attention.form == "factor"
        self.kappa = Learned(torch.ones(self.heads))
        width = self.heads * attention.rank
        self.w_v = Keys(d, width) if factor else None
        self.w_q = linear(d, width, bias=False) if attention.query_projection else None
        self.bias = Learned(torch.zeros(self.heads, max_len)) if attention.relative_bias and factor else None

    def forward(
        self, samples: Sequence[Tensor], x_ND: Tensor, s_ND: Tensor, rows: Rows
    ) -> tuple[tuple[Logits, ...], dict[str, Tensor]]:
        """Logits of each of `samples` (g [M, H, K]), with keys and bias common to them; and κ for diagnostics."""
        kappa_H1 = self.kappa()[:, None]
        statistics = {"kappa": kappa_H1.detach().flatten()}
        if self.w_v is None:
            return tuple(Logits(offset_MHK=kappa_H1 * g_MHK) for g_MHK in samples), statistics
        key_NHR = split_heads(self.w_v(s_ND, x_ND), self.heads)
        bias_H1K = self.bias()[:, None, : rows.context.layout.width] if self.bias is not None else None
        scale_H1 = kappa_H1 / math.sqrt(key_NHR.shape[-1])
        if self.w_q is not None:
            projected_MHR = split_heads(self.w_q(rows.take(x_ND)), self.heads)
            samples = [u_MHR + projected_MHR for u_MHR in samples]
        return tuple(Logits(scale_H1 * u_MHR, key_NHR, bias_H1K) for u_MHR in samples), statistics


class Keys(nn.Module):
    """V_j = W_v[S_j; X_j] without joining S and X: [N, D], [N, D] → [N, H·R]."""

    def __init__(self, hidden_size: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(nn.init.xavier_uniform_(torch.empty(outputs, 2 * hidden_size)))

    def forward(self, s_ND: Tensor, x_ND: Tensor) -> Tensor:
        of_s, of_x = self.weight.chunk(2, dim=1)
        return torch.addmm(F.linear(s_ND, of_s), x_ND, of_x.T)


class Values(nn.Module):
    """V = X (the paper removes the projections [P]), or V = X W_V: [N, D] → [N, H, E]."""

    def __init__(self, model: ModelConfig, projection: bool) -> None:
        super().__init__()
        self.heads = model.num_heads
        self.w_value = linear(model.hidden_size, model.hidden_size, bias=False) if projection else nn.Identity()

    def forward(self, x_ND: Tensor) -> Tensor:
        return split_heads(self.w_value(x_ND), self.heads)
