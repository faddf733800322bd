"""Maps drawn again and again from one trained attention whose inputs are held: the samples behind claims about laws.

Legend: B sequences, n width of the batch, N real tokens, D hidden width d, H heads, S draws.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from genatt_dist.attention.attend import attention_map
from genatt_dist.attention.base import Generator
from genatt_dist.model.backbone import Backbone
from genatt_dist.model.block import Block
from genatt_dist.model.context import Context
from genatt_dist.model.diagnostics import resampled, total_variation


@dataclass(frozen=True)
class Place:
    """One block's attention, and the tokens, states and context that it was given in one forward pass."""

    attention: Generator
    x_ND: Tensor
    s_ND: Tensor | None
    context: Context

    def maps(self, draws: int, **changes: Any) -> Tensor:
        """Maps as inference samples them: [S, B, H, n, n]. changes: fields of the attention's configuration."""
        return self._draw(draws, training=False, changes=changes)

    def target_maps(self, draws: int) -> Tensor:
        """What D-GenAtt's sampler is to reproduce, maps of g_0 = rms(Dec(z)) with z ~ q(z | S): [S, B, H, n, n].

        Those are the rows that training ranks by where ρ = 0.
        """
        return self._draw(draws, training=True, changes={"rec_mix": 0.0})

    @torch.no_grad()
    def _draw(self, draws: int, training: bool, changes: dict[str, Any]) -> Tensor:
        attention: Any = copy.deepcopy(self.attention).train(training)  # training would move ς
        if changes:
            attention.config = attention.config.model_copy(update=changes)
        layout, maps = self.context.layout, []
        for draw in range(draws):
            generated = attention(self.x_ND, self.s_ND, resampled(self.context, 1 + draw), sample=True)
            maps.append(attention_map(generated, layout))
        return torch.stack(maps)


@torch.no_grad()
def places(backbone: Backbone, rows_ND: Tensor, context: Context) -> list[Place]:
    """Every block's attention with what one forward pass in evaluation mode gives it."""
    found: list[Place] = []

    def note(attention: Any, arguments: tuple[Any, ...]) -> None:
        found.append(Place(attention, arguments[0], arguments[1], context))

    blocks = [module for module in backbone.modules() if isinstance(module, Block)]
    hooks = [block.attention.register_forward_pre_hook(note) for block in blocks if block.attention is not None]
    backbone.eval()(rows_ND, context)
    for hook in hooks:
        hook.remove()
    return found


def variation(maps_SBHnn: Tensor, place: Place) -> float:
    """Total variation between two draws of one row, mean over rows i ≥ 1 and over neighbouring draws."""
    pairs, layout = pairwise(maps_SBHnn), place.context.layout
    return float(torch.stack([total_variation(a, b, layout).mean() for a, b in pairs]).mean())
