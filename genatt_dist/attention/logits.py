"""From a generated row g to its logits G, and the values beside it (MATH §3): κ, keys, relative bias, projections.

Legend: N real tokens, n width of the batch, D hidden width d, H heads, E = d/H, R factor rank r, K entries of a row g.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from genatt_dist.attention.base import Factors, Logits, OffsetLogits, linear, split_heads
from genatt_dist.config import DiffusionAttention, ModelConfig, VariationalAttention
from genatt_dist.model.jagged import Jagged


class RelativeBias(nn.Module):
    """b_{i−j}, learned per head, initially 0."""

    def __init__(self, heads: int, max_len: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(heads, max_len))

    def forward(self, width: int) -> Tensor:
        """[H, n, n]; what stands above the diagonal has no meaning."""
        index_n = torch.arange(width, device=self.bias.device)
        return self.bias[:, (index_n[:, None] - index_n).clamp(min=0)]


class GeneratedLogits(nn.Module):
    """G_ij = κ·U_i·V_j/√r + b_{i−j} with V_j = W_v[S_j; X_j] (`factor`), or G_ij = κ·g_{i,i−j} (`matrix`).

    κ is a learned scale per head, initially 1, after any normalisation of g; `query_projection` adds x W_Q to U.
    """

    def __init__(self, model: ModelConfig, attention: VariationalAttention | DiffusionAttention, max_len: int) -> None:
        super().__init__()
        d, self.heads, factor = model.hidden_size, model.num_heads, attention.form == "factor"
        self.kappa = nn.Parameter(torch.ones(self.heads))
        width = self.heads * attention.rank
        self.w_v = linear(2 * d, width, bias=False) if factor else None
        self.w_q = linear(d, width, bias=False) if attention.query_projection else None
        self.b = RelativeBias(self.heads, max_len) if attention.relative_bias and factor else None

    def forward(
        self, rows: Sequence[Tensor], x_ND: Tensor, s_ND: Tensor, layout: Jagged
    ) -> tuple[tuple[Logits, ...], dict[str, Tensor]]:
        """Logits of each of `rows` (samples g [N, H, K]), with keys and bias common to them; and κ for diagnostics."""
        kappa_H1, statistics = self.kappa[:, None], {"kappa": self.kappa.detach().clone()}
        if self.w_v is None:
            return tuple(OffsetLogits(kappa_H1 * g_NHK) for g_NHK in rows), statistics
        key_NHR = split_heads(self.w_v(torch.cat((s_ND, x_ND), dim=-1)), self.heads)
        projected_NHR = split_heads(self.w_q(x_ND), self.heads) if self.w_q is not None else 0.0
        bias_Hnn = self.b(layout.width) if self.b is not None else None
        scale_H1 = kappa_H1 / math.sqrt(key_NHR.shape[-1])
        return tuple(Factors(scale_H1 * (u_NHR + projected_NHR), key_NHR, bias_Hnn) for u_NHR in rows), statistics


class Values(nn.Module):
    """V = X (the paper removes the projections [P]), or V = X W_V: [N, D] → [N, H, E]."""

    def __init__(self, model: ModelConfig, projection: bool) -> None:
        super().__init__()
        self.heads = model.num_heads
        self.w_value = linear(model.hidden_size, model.hidden_size, bias=False) if projection else nn.Identity()

    def forward(self, x_ND: Tensor) -> Tensor:
        return split_heads(self.w_value(x_ND), self.heads)
