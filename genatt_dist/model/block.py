"""One block: attention by generated maps, then the feed-forward part, each with its residual and layer norm (MATH §2).

Legend: N real tokens, M rows that are made, D hidden width d.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn
from torch.nn import functional as F

from genatt_dist.attention.attend import attend, last_rows
from genatt_dist.attention.base import Generated, Rows, linear
from genatt_dist.attention.build import build, values
from genatt_dist.config import ModelConfig
from genatt_dist.model.context import Context
from genatt_dist.model.dropout import Dropout, Site


class Block(nn.Module):
    """X' = LN(X + Drop(W_o · concat_h(A^h V^h))); X⁺ = LN(X' + Drop(W_b GELU(W_a X'))), 4d inside.

    Where all blocks share one map, the first makes it and the others have values alone.
    """

    def __init__(self, config: ModelConfig, max_len: int, index: int) -> None:
        super().__init__()
        d, generates = config.hidden_size, index == 0 or not config.share_map
        self.attention = build(config.attention, config, max_len, index) if generates else None
        self.values = None if generates else values(config.attention, config)
        self.w_o, self.w_a, self.w_b = linear(d, d), linear(d, 4 * d), linear(4 * d, d)
        self.attention_norm, self.feed_forward_norm = nn.LayerNorm(d), nn.LayerNorm(d)
        self.attention_dropout = Dropout(config.dropout, Site.ATTENTION, index)
        self.feed_forward_dropout = Dropout(config.dropout, Site.FEED_FORWARD, index)

    def forward(
        self,
        x_ND: Tensor,
        s_ND: Tensor | None,
        context: Context,
        sample: bool = False,
        last: bool = False,
        shared: Generated | None = None,
    ) -> tuple[Tensor, Generated]:
        """X, S → X⁺ [M, D] and what the attention generated.

        last: only each sequence's last row (M = B). shared: the map of the first block, where all blocks use it.
        """
        generated = self._generate(x_ND, s_ND, context, sample, last, shared)
        a_MD = self.w_o(attend(generated, context.layout))
        x_MD = self.attention_norm(Rows.of(context, last).take(x_ND) + self.attention_dropout(a_MD, context))
        f_MD = self.w_b(F.gelu(self.w_a(x_MD)))
        return self.feed_forward_norm(x_MD + self.feed_forward_dropout(f_MD, context)), generated

    def _generate(
        self,
        x_ND: Tensor,
        s_ND: Tensor | None,
        context: Context,
        sample: bool,
        last: bool,
        shared: Generated | None,
    ) -> Generated:
        if self.attention is not None:
            generated: Generated = self.attention(x_ND, s_ND, context, sample, last)
            return generated
        assert shared is not None, "this block has no map of its own"
        assert self.values is not None
        shared = replace(shared, value_NHE=self.values(x_ND))
        return last_rows(shared, context.layout) if last else shared
