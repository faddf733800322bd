"""What an attention generator is: states and tokens in; logits or factors, values and a share of the loss out.

Legend: B sequences, N real tokens, M rows that are made (N, or B last ones), n width of the batch, D hidden width d,
H heads, E = d/H, R width of a factor, K = n offsets, I = 1 or n.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from genatt_dist.attention.noise import NoiseKey
from genatt_dist.model.context import Context
from genatt_dist.model.jagged import Jagged


@dataclass(frozen=True)
class Logits:
    """G_ij = query_i · key_j + b_{i,i−j} + o_{i,i−j}; a part that is None adds nothing.

    query_MHR, key_NHR: the query holds its scale. bias_HIK: learned, for k steps back, one row for all positions or one
    for each. offset_MHK: row i's own logit for k steps back. Entries k > i are ignored.
    """

    query_MHR: Tensor | None = None
    key_NHR: Tensor | None = None
    bias_HIK: Tensor | None = None
    offset_MHK: Tensor | None = None


@dataclass(frozen=True)
class Rows:
    """The rows of the maps that a generator makes: of all real tokens, or (serving) of each sequence's last one.

    index_M: their places among the N tokens, None for all of them in order.
    """

    context: Context
    index_M: Tensor | None

    @staticmethod
    def of(context: Context, last: bool) -> Rows:
        """All rows, or the last one of each sequence."""
        return Rows(context, context.layout.last_B if last else None)

    def take(self, x_N: Tensor) -> Tensor:
        """What a tensor of the real tokens holds for these rows."""
        return x_N if self.index_M is None else x_N.index_select(0, self.index_M)

    @property
    def position_M(self) -> Tensor:
        return self.take(self.context.layout.position_N)

    def noise(self, what: str) -> NoiseKey:
        """The keys of these rows, the same whichever others are made; ValueError naming `what` where there are none."""
        noise = self.context.noise_for(what)
        return NoiseKey(self.take(noise.token_N), noise.sequence_B)


@dataclass(frozen=True)
class Generated:
    """What one generator made for one batch.

    samples: one or more maps of the same rows, which share keys and bias; attention is their mean. None at all where
        nothing is mixed: then `value_NHE` is the output, row by row.
    value_NHE: what the maps average: of all tokens, whichever rows are made.
    loss: scalar, this part's share of the block's L_gen: the shares of all parts of a global batch add up to it. 0 in
        evaluation mode.
    statistics: detached tensors for diagnostics (κ and α per head, sums of the KL per dimension, ς).
    last: whether only the last row of each sequence was made.
    """

    samples: tuple[Logits, ...]
    value_NHE: Tensor
    loss: Tensor
    statistics: dict[str, Tensor] = field(default_factory=dict)
    last: bool = False


class Generator(nn.Module):
    """The protocol of an attention generator. It keeps no state but ς, and draws from context.noise alone."""

    def forward(
        self, x_ND: Tensor, s_ND: Tensor | None, context: Context, sample: bool = False, last: bool = False
    ) -> Generated:
        """Maps of the block's tokens X given the encoder states S (None where the attention needs no encoder).

        sample: draw maps in evaluation mode too, whatever inference the configuration names (diagnostics want samples).
        last: make only the last row of each sequence: M = B rows instead of N.
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


class Learned(nn.Module):
    """A parameter that no layer owns, handed out by a forward of its own.

    Where parameters are partitioned (ZeRO-3) they are whole only while their module runs, forward and backward, and
    DeepSpeed finds where the backward begins by the tensors that a forward returns: not inside a dataclass.
    """

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = nn.Parameter(value)

    def forward(self) -> Tensor:
        """A copy: a view would be of storage that is freed."""
        return self.value.clone()


def widen(x: Tensor) -> Tensor:
    """At least float32: sums over tokens are never formed in half precision."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def split_heads(x_ND: Tensor, heads: int) -> Tensor:
    """[N, H·E] → [N, H, E]"""
    return x_ND.unflatten(-1, (heads, -1))


def condition(s_ND: Tensor, kind: str, rows: Rows) -> Tensor:
    """What row i is conditioned on: S_i (`prefix` [D]), or its sequence's last state (`last`, the literal h_g [P])."""
    layout: Jagged = rows.context.layout
    return rows.take(s_ND if kind == "prefix" else s_ND[layout.last_B[layout.row_N]])


def linear(inputs: int, outputs: int, bias: bool = True) -> nn.Linear:
    """A linear layer with Xavier-uniform weights and zero bias."""
    layer = nn.Linear(inputs, outputs, bias=bias)
    nn.init.xavier_uniform_(layer.weight)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer
