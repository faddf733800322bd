"""The entries of a generated row: which exist, their noise, and linear maps from and to them (MATH §3).

A generated row g has K entries a head: K = r in form `factor` (all exist), K = n offsets in form `matrix`, of which row
i has k = 0..i, "k steps back". Of `max_len` offsets only the first n are computed: no row of the batch reaches further.

Legend: N real tokens, H heads, K entries, I and O widths of other layers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from genatt_dist.attention.noise import derive, normal
from genatt_dist.model.jagged import Jagged


@dataclass(frozen=True)
class Entries:
    """Which entries the rows of a batch have. valid_N1K: None where all exist; count_N11: how many a head has."""

    width: int
    count_N11: Tensor
    valid_N1K: Tensor | None

    @staticmethod
    def of(form: str, rank: int, layout: Jagged) -> Entries:
        position_N11 = layout.position_N[:, None, None]
        if form == "factor":
            return Entries(rank, torch.full_like(position_N11, rank), None)
        offset_K = torch.arange(layout.width, device=position_N11.device)
        return Entries(layout.width, position_N11 + 1, offset_K <= position_N11)

    def mask(self, x_NHK: Tensor) -> Tensor:
        """Exactly 0 at entries that do not exist."""
        return x_NHK if self.valid_N1K is None else x_NHK.masked_fill(~self.valid_N1K, 0.0)

    def mean_square(self, x_NHK: Tensor) -> Tensor:
        """Mean of x² over the valid entries of each row and head: [N, H, K] (0 at invalid ones) → [N, H, 1]."""
        return x_NHK.square().sum(-1, keepdim=True) / self.count_N11.to(x_NHK.dtype)

    def normal(self, key_N: Tensor, heads: int, like: Tensor) -> Tensor:
        """Standard normals at the valid entries, keyed by token, head and entry: [N, H, K] in the dtype of `like`."""
        key_NH = derive(key_N[:, None], torch.arange(heads, device=key_N.device))
        assert isinstance(key_NH, Tensor)
        return self.mask(normal(key_NH, self.width).to(like.dtype))


class ToEntries(nn.Module):
    """Linear map to the entries of every head: [N, I] → [N, H, K] for any K up to the width it was built for."""

    def __init__(self, inputs: int, heads: int, entries: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(heads, entries, inputs))
        self.bias = nn.Parameter(torch.zeros(heads, entries))
        nn.init.xavier_uniform_(self.weight.data.view(heads * entries, inputs))

    def forward(self, x_NI: Tensor, width: int) -> Tensor:
        heads, _, inputs = self.weight.shape
        weight, bias = self.weight[:, :width].reshape(-1, inputs), self.bias[:, :width].reshape(-1)
        return F.linear(x_NI, weight, bias).view(-1, heads, width)


class FromEntries(nn.Module):
    """Linear map without bias from the entries of every head: [N, H, K] → [N, O] for any K up to its own."""

    def __init__(self, heads: int, entries: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, heads, entries))
        nn.init.xavier_uniform_(self.weight.data.view(outputs, heads * entries))

    def forward(self, x_NHK: Tensor) -> Tensor:
        return F.linear(x_NHK.flatten(1), self.weight[..., : x_NHK.shape[-1]].flatten(1))
