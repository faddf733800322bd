"""Control: a learned map that knows positions and no content, the same for every sequence (MATH §6).

Legend: N real tokens, H heads, n width of the batch, K = n offsets.
"""

from __future__ import annotations

import torch
from torch import Tensor

from genatt_dist.attention.base import Generated, Generator, Learned, Logits
from genatt_dist.attention.logits import Values
from genatt_dist.attention.options import PositionalAttention
from genatt_dist.config import ModelConfig
from genatt_dist.model.context import Context


class Positional(Generator):
    """G_ij = b_{i−j} + c_{i,i−j}: what all positions share, and each position's own."""

    def __init__(self, model: ModelConfig, attention: PositionalAttention, max_len: int) -> None:
        super().__init__()
        self.shared = Learned(torch.zeros(model.num_heads, 1, max_len))
        self.own = Learned(torch.zeros(model.num_heads, max_len, max_len))
        self.values = Values(model, attention.value_projection)

    def forward(
        self, x_ND: Tensor, s_ND: Tensor | None, context: Context, sample: bool = False, last: bool = False
    ) -> Generated:
        n = context.layout.width
        logits = Logits(bias_HIK=(self.shared() + self.own())[:, :n, :n])
        return Generated((logits,), self.values(x_ND), loss=context.num_tokens.new_zeros(()), last=last)
