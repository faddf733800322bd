"""Control: the encoder's state in place of attention, with the same feed-forward part (MATH §6).

Legend: N real tokens, D hidden width d.
"""

from __future__ import annotations

from torch import Tensor

from genatt_dist.attention.base import Generated, Generator, Rows, split_heads
from genatt_dist.config import ModelConfig
from genatt_dist.model.context import Context


class Recurrent(Generator):
    """No map: row i gets S_i."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.heads = model.num_heads

    def forward(
        self, x_ND: Tensor, s_ND: Tensor | None, context: Context, sample: bool = False, last: bool = False
    ) -> Generated:
        assert s_ND is not None, "the GRU control needs the encoder states S"
        value_MHE = split_heads(Rows.of(context, last).take(s_ND), self.heads)
        return Generated((), value_MHE, loss=context.num_tokens.new_zeros(()), last=last)
