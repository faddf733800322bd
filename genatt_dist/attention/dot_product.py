"""SASRec's attention, G_ij = (W_Q x_i)·(W_K x_j)/√(d/H): the control with all its projections (MATH §2), plain or with
Gaussian noise on the logits (MATH §6).

Legend: N real tokens, M rows that are made, D hidden width d, H heads, E = d/H, K = n offsets.
"""

from __future__ import annotations

import math
from dataclasses import replace

from torch import Tensor

from genatt_dist.attention.base import Generated, Generator, Logits, Rows, linear, split_heads
from genatt_dist.attention.entries import Entries
from genatt_dist.attention.noise import Purpose
from genatt_dist.attention.options import NoisyDotProductAttention
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

    def forward(
        self, x_ND: Tensor, s_ND: Tensor | None, context: Context, sample: bool = False, last: bool = False
    ) -> Generated:
        k_NHE, v_NHE = (split_heads(w(x_ND), self.heads) for w in (self.w_k, self.w_v))
        q_MHE = split_heads(self.w_q(Rows.of(context, last).take(x_ND)), self.heads)
        logits = Logits(q_MHE / math.sqrt(q_MHE.shape[-1]), k_NHE)
        return Generated((logits,), v_NHE, loss=context.num_tokens.new_zeros(()), last=last)


class NoisyDotProduct(DotProduct):
    """G_ij + σ ε_ij, ε ~ N(0, 1) drawn for each pair: what a map gains by being random at all."""

    def __init__(self, model: ModelConfig, attention: NoisyDotProductAttention, block: int) -> None:
        super().__init__(model)
        self.config, self.block = attention, block

    def forward(
        self, x_ND: Tensor, s_ND: Tensor | None, context: Context, sample: bool = False, last: bool = False
    ) -> Generated:
        generated = super().forward(x_ND, s_ND, context, sample, last)
        if not (self.training or sample or self.config.inference == "sample"):
            return generated
        rows = Rows.of(context, last)
        key_M = rows.noise("sampling the noise of dot-product logits").token(Purpose.LOGIT, self.block)
        entries = Entries.of("matrix", 0, rows)
        noise_MHK = entries.normal(key_M, self.heads, like=generated.value_NHE)
        (logits,) = generated.samples
        return replace(generated, samples=(replace(logits, offset_MHK=self.config.noise * noise_MHK),))
