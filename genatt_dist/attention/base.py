"""What an attention generator is: states and tokens in; logits or factors, values and a share of the loss out.

Legend: N real tokens, n width of the batch, D hidden width d, H heads, E = d/H, R width of a factor, K = n offsets.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from genatt_dist.model.context import Context
from genatt_dist.model.jagged import Jagged


@dataclass(frozen=True)
class Factors:
    """G_ij = query_i · key_j + b_{i−j}. The query holds κ/√r; bias_Hnn[h, i, j] = b_{i−j} of head h, or None."""

    query_NHR: Tensor
    key_NHR: Tensor
    bias_Hnn: Tensor | None = None


@dataclass(frozen=True)
class OffsetLogits:
    """G_ij = g_{i,i−j}. logits_NHK[i, h, k] is κ times the logit of "k steps back"; entries k > i are ignored."""

    logits_NHK: Tensor


Logits = Factors | OffsetLogits


@dataclass(frozen=True)
class Generated:
    """What one generator made for one batch.

    samples: one or more maps of the same rows; attention is their mean.
    value_NHE: what the maps average.
    loss: scalar, this part's share of the block's L_gen: the shares of all parts of a global batch add up to it. 0 in
        evaluation mode.
    statistics: detached tensors for diagnostics (κ per head, sums of the KL per dimension, ς).
    """

    samples: tuple[Logits, ...]
    value_NHE: Tensor
    loss: Tensor
    statistics: dict[str, Tensor] = field(default_factory=dict)


class Generator(nn.Module):
    """The protocol of an attention generator. It keeps no state but ς, and draws from context.noise alone."""

    def forward(self, x_ND: Tensor, s_ND: Tensor | None, context: Context, sample: bool = False) -> Generated:
        """Maps of the block's tokens X given the encoder states S (None for dot product).

        sample: draw maps in evaluation mode too, whatever inference the configuration names (diagnostics want samples).
        """
        raise NotImplementedError


class Float32Buffers(nn.Module):
    """A module whose own buffers stay float32 when it is cast: in bfloat16 running statistics stop moving."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            moved = self._buffers[name]
            if buffer is not None and moved is not None:
                self._buffers[name] = moved.float() if buffer.is_meta else buffer.to(moved.device)
        return self


def widen(x: Tensor) -> Tensor:
    """At least float32: sums over tokens are never formed in half precision."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def split_heads(x_ND: Tensor, heads: int) -> Tensor:
    """[N, H·E] → [N, H, E]"""
    return x_ND.unflatten(-1, (heads, -1))


def condition(s_ND: Tensor, kind: str, layout: Jagged) -> Tensor:
    """What row i is conditioned on: S_i (`prefix` [D]), or its sequence's last state (`last`, the literal h_g [P])."""
    return s_ND if kind == "prefix" else s_ND[layout.last_B[layout.row_N]]


def linear(inputs: int, outputs: int, bias: bool = True) -> nn.Linear:
    """A linear layer with Xavier-uniform weights and zero bias."""
    layer = nn.Linear(inputs, outputs, bias=bias)
    nn.init.xavier_uniform_(layer.weight)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer
