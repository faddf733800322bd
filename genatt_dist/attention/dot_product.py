"""SASRec's attention, G_ij = (W_Q x_i)·(W_K x_j)/√(d/H): the control with all its projections (MATH §2).

Legend: N real tokens, D hidden width d, H heads, E = d/H.
"""

from __future__ import annotations

import math

from torch import Tensor

from genatt_dist.attention.base import Factors, Generated, Generator, linear, split_heads
from genatt_dist.config import ModelConfig
from genatt_dist.model.context import Context


class DotProduct(Generator):
    """Queries, keys and values are projections of the tokens; nothing is generated, so the loss is 0."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        d, self.heads = model.hidden_size, model.num_heads
        # A bias on the keys cancels in the softmax, and one on the values is W_o's: only the query's does anything.
        self.w_q = linear(d, d)
        self.w_k = linear(d, d, bias=False)
        self.w_v = linear(d, d, bias=False)

    def forward(self, x_ND: Tensor, s_ND: Tensor | None, context: Context, sample: bool = False) -> Generated:
        q_NHE, k_NHE, v_NHE = (split_heads(w(x_ND), self.heads) for w in (self.w_q, self.w_k, self.w_v))
        factors = Factors(q_NHE / math.sqrt(q_NHE.shape[-1]), k_NHE)
        return Generated((factors,), v_NHE, loss=context.num_tokens.new_zeros(()))
