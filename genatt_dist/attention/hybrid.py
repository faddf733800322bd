"""G = G_gen + α·QKᵀ/√(d/H), α learned from 0: whether a deterministic part adds to the generated one (MATH §6).

Legend: N real tokens, M rows that are made, D hidden width d, H heads, E = d/H, R width of a factor.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from genatt_dist.attention.base import Generated, Generator, Learned, Logits, Rows, linear, split_heads
from genatt_dist.config import ModelConfig
from genatt_dist.model.context import Context


class Hybrid(Generator):
    """A generator and dot-product attention whose logits add up; α is a learned scale per head, initially 0."""

    def __init__(self, model: ModelConfig, generator: Generator) -> None:
        super().__init__()
        d, self.heads = model.hidden_size, model.num_heads
        self.generator = generator
        self.alpha = Learned(torch.zeros(self.heads))
        self.w_q = linear(d, d)
        self.w_k = linear(d, d, bias=False)

    def forward(
        self, x_ND: Tensor, s_ND: Tensor | None, context: Context, sample: bool = False, last: bool = False
    ) -> Generated:
        generated: Generated = self.generator(x_ND, s_ND, context, sample, last)
        q_MHE, k_NHE = self.w_q(Rows.of(context, last).take(x_ND)), split_heads(self.w_k(x_ND), self.heads)
        alpha_H1 = self.alpha()[:, None]
        q_MHE = alpha_H1 / math.sqrt(k_NHE.shape[-1]) * split_heads(q_MHE, self.heads)

        def joined(logits: Logits) -> Logits:
            """Sums of products are products of what is joined: [U; αQ]·[V; K] = U·V + αQ·K."""
            if logits.query_MHR is None or logits.key_NHR is None:
                return replace(logits, query_MHR=q_MHE, key_NHR=k_NHE)
            query = torch.cat((logits.query_MHR, q_MHE), dim=-1)
            return replace(logits, query_MHR=query, key_NHR=torch.cat((logits.key_NHR, k_NHE), dim=-1))

        statistics = generated.statistics | {"alpha": alpha_H1.detach().flatten()}
        return replace(generated, samples=tuple(map(joined, generated.samples)), statistics=statistics)
