"""Dropout whose mask is a function of keys alone: a token loses the same entries in whatever batch it comes.

Legend: N real tokens, D any width.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from genatt_dist.attention.noise import Purpose, keep_mask
from genatt_dist.model.context import Context


class Site(IntEnum):
    """Where in the model a mask is drawn; with the block's index it makes the key of the mask."""

    EMBEDDING = 0
    ATTENTION = 1
    FEED_FORWARD = 2


def dropout(x_ND: Tensor, p: float, key_N: Tensor) -> Tensor:
    """Zero each entry with probability p < 1 and scale the others by 1/(1 − p): [N, D] → [N, D]."""
    dropped_ND: Tensor = _Drop.apply(x_ND, keep_mask(key_N, x_ND.shape[-1], p), p)
    return dropped_ND


class _Drop(torch.autograd.Function):
    """x · keep / (1 − p). One byte an entry waits for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, keep_ND: Tensor, p: float) -> Tensor:
        ctx.save_for_backward(keep_ND)
        ctx.p = p
        return _scaled(x_ND, keep_ND, p)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        (keep_ND,) = ctx.saved_tensors
        return _scaled(grad_outputs[0], keep_ND, ctx.p), None, None


def _scaled(x_ND: Tensor, keep_ND: Tensor, p: float) -> Tensor:
    # Bytes turn into floats in a vector loop, booleans do not; and a product of two types is converted entry by entry.
    return keep_ND.view(torch.uint8).to(x_ND.dtype).mul_(x_ND).div_(1 - p)


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
