"""Dropout whose mask is a function of keys alone: a token loses the same entries in whatever batch it comes.

Legend: N real tokens, D any width.
"""

from __future__ import annotations

from enum import IntEnum

from torch import Tensor, nn

from genatt_dist.attention.noise import Purpose, keep_mask
from genatt_dist.model.context import Context


class Site(IntEnum):
    """Where in the model a mask is drawn; with the block's index it makes the key of the mask."""

    EMBEDDING = 0
    ATTENTION = 1
    FEED_FORWARD = 2


def dropout(x_ND: Tensor, p: float, key_N: Tensor) -> Tensor:
    """Zero each entry with probability p and scale the others by 1/(1 − p): [N, D] → [N, D]."""
    return x_ND * keep_mask(key_N, x_ND.shape[-1], p) / (1 - p)


class Dropout(nn.Module):
    """`dropout` at one site of one block; the identity in evaluation mode and for p = 0."""

    def __init__(self, p: float, site: Site, block: int = 0) -> None:
        super().__init__()
        self.p, self.site, self.block = p, site, block

    def forward(self, x_ND: Tensor, context: Context) -> Tensor:
        if not self.training or self.p == 0:
            return x_ND
        key_N = context.noise_for("dropout in training mode").token(Purpose.DROPOUT, self.block, self.site)
        return dropout(x_ND, self.p, key_N)
