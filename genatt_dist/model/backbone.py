"""From item rows to states: positions, the shared encoder, the blocks (MATH §2).

Legend: B sequences, N real tokens, D hidden width d.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from genatt_dist.attention.base import Generated
from genatt_dist.config import ModelConfig
from genatt_dist.model.block import Block
from genatt_dist.model.context import Context
from genatt_dist.model.dropout import Dropout, Site
from genatt_dist.model.encoder import Encoder


@dataclass(frozen=True)
class Output:
    """What the backbone returns.

    states_ND: one state for each real token.
    generative_loss: scalar, this part's share of L_gen (sums over its tokens / context.num_tokens: shares add up to the
        global value), as the mean over the blocks that generate a map [D], so that γ, left to the caller, means the
        same for any depth. 0 in evaluation mode.
    maps: what the attention of each block generated; one alone where all blocks share it.
    """

    states_ND: Tensor
    generative_loss: Tensor
    maps: tuple[Generated, ...]


class Backbone(nn.Module):
    """X⁰ = Drop(LN(E[s] + P)), S = GRU(X⁰), then L blocks."""

    def __init__(self, config: ModelConfig, max_len: int) -> None:
        super().__init__()
        d, self.max_len = config.hidden_size, max_len
        self.position = nn.Embedding(max_len, d)
        nn.init.normal_(self.position.weight, std=0.02)
        self.norm = nn.LayerNorm(d)
        self.dropout = Dropout(config.dropout, Site.EMBEDDING)
        self.encoder = Encoder(d) if config.encoded else None
        self.blocks = nn.ModuleList(Block(config, max_len, index) for index in range(config.num_blocks))

    def forward(self, rows_ND: Tensor, context: Context, sample: bool = False) -> Output:
        """rows_ND: item embeddings E[s] of the real tokens; sample: draw maps in evaluation mode too, whatever the
        configured inference is."""
        x_ND, maps = self._blocks(rows_ND, context, sample, last=False)
        loss = torch.stack([generated.loss for generated in maps]).mean()
        return Output(x_ND, loss, tuple(maps))

    def last_states(self, rows_ND: Tensor, context: Context) -> Tensor:
        """The state of each sequence's last token, [B, D]: what `forward` gives there, with the last block computed for
        that row alone.
        """
        return self._blocks(rows_ND, context, sample=False, last=True)[0]

    def _blocks(self, rows_ND: Tensor, context: Context, sample: bool, last: bool) -> tuple[Tensor, list[Generated]]:
        """States [N, D] (or [B, D] of the last tokens), and what each block that has a map of its own generated."""
        layout = context.layout
        assert rows_ND.shape[0] == layout.row_N.shape[0], f"{rows_ND.shape[0]} rows for {layout.row_N.shape[0]} tokens"
        assert layout.width <= self.max_len, f"a batch {layout.width} wide for max_len={self.max_len}"
        x_ND = self.dropout(self.norm(rows_ND + self.position(layout.position_N)), context)
        s_ND = self.encoder(x_ND, layout) if self.encoder is not None else None
        maps: list[Generated] = []
        for index, block in enumerate(self.blocks):
            ends = last and index == len(self.blocks) - 1
            x_ND, generated = block(x_ND, s_ND, context, sample, ends, maps[0] if maps else None)
            if block.attention is not None:
                maps.append(generated)
        return x_ND, maps
