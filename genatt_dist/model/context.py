"""What one forward pass knows besides its rows: where tokens lie, its noise, and how sums of its part become global.

Legend: B sequences, N real tokens of this part.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from genatt_dist.attention.noise import NoiseKey
from genatt_dist.model.jagged import Jagged


def identity(x: Tensor) -> Tensor:
    """The sum over all parts of a batch that has one part."""
    return x


@dataclass(frozen=True)
class Context:
    """What one forward pass knows besides the rows.

    layout: where the real tokens of this part lie.
    noise: keys of every draw; None allows none (inference by the mean, dropout off).
    num_tokens: float32 scalar, real tokens of the whole (global) batch.
    total: sums a tensor, without gradient, over all parts of the global batch. Training calls it equally often in every
        part; evaluation never does, so that parts may evaluate different numbers of batches.
    """

    layout: Jagged
    noise: NoiseKey | None = None
    num_tokens: Tensor = field(kw_only=True)
    total: Callable[[Tensor], Tensor] = field(default=identity, kw_only=True)

    @staticmethod
    def whole(layout: Jagged, noise: NoiseKey | None = None) -> Context:
        """The context of a batch that has one part."""
        num_tokens = torch.full((), layout.row_N.shape[0], dtype=torch.float32, device=layout.row_N.device)
        return Context(layout, noise, num_tokens=num_tokens)

    def noise_for(self, what: str) -> NoiseKey:
        """The noise, or ValueError naming what needs it."""
        if self.noise is None:
            raise ValueError(f"{what} draws random numbers, but context.noise is None: give it NoiseKey.make(...)")
        return self.noise
