"""One block: attention by generated maps, then the feed-forward part, each with its residual and layer norm (MATH §2).

Legend: N real tokens, D hidden width d.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from genatt_dist.attention.attend import attend
from genatt_dist.attention.base import Generated, linear
from genatt_dist.attention.build import build
from genatt_dist.config import ModelConfig
from genatt_dist.model.context import Context
from genatt_dist.model.dropout import Dropout, Site


class Block(nn.Module):
    """X' = LN(X + Drop(W_o · concat_h(A^h V^h))); X⁺ = LN(X' + Drop(W_b GELU(W_a X'))), 4d inside."""

    def __init__(self, config: ModelConfig, max_len: int, index: int) -> None:
        super().__init__()
        d = config.hidden_size
        self.attention = build(config.attention, config, max_len, index)
        self.w_o, self.w_a, self.w_b = linear(d, d), linear(d, 4 * d), linear(4 * d, d)
        self.attention_norm, self.feed_forward_norm = nn.LayerNorm(d), nn.LayerNorm(d)
        self.attention_dropout = Dropout(config.dropout, Site.ATTENTION, index)
        self.feed_forward_dropout = Dropout(config.dropout, Site.FEED_FORWARD, index)

    def forward(
        self, x_ND: Tensor, s_ND: Tensor | None, context: Context, sample: bool = False
    ) -> tuple[Tensor, Generated]:
        """X, S → X⁺ [N, D] and what the attention generated."""
        generated = self.attention(x_ND, s_ND, context, sample)
        a_ND = self.w_o(attend(generated, generated.value_NHE, context.layout))
        x_ND = self.attention_norm(x_ND + self.attention_dropout(a_ND, context))
        f_ND = self.w_b(F.gelu(self.w_a(x_ND)))
        return self.feed_forward_norm(x_ND + self.feed_forward_dropout(f_ND, context)), generated
