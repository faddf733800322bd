"""The entries of a generated row: which exist, their noise, and linear maps from and to them (MATH §3).

A generated row g has K entries a head: K = r in form `factor` (all exist), K = n offsets in form `matrix`, of which row
i has k = 0..i, "k steps back". Of `max_len` offsets only the first n are computed: no row of the batch reaches further.

Legend: M rows that are made, H heads, K entries, I and O widths of other layers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from genatt_dist.attention.base import Rows
from genatt_dist.attention.noise import derive, normal
from genatt_dist.attention.options import DecodedAttention


def row_width(attention: DecodedAttention, max_len: int) -> int:
    """K of a generated row: r, or as many offsets as a history can have."""
    return attention.rank if attention.form == "factor" else max_len


@dataclass(frozen=True)
class Entries:
    """Which entries the rows have. valid_M1K: None where all exist; count_M11: how many a head has."""

    width: int
    count_M11: Tensor
    valid_M1K: Tensor | None

    @staticmethod
    def of(form: str, rank: int, rows: Rows) -> Entries:
        position_M11, width = rows.position_M[:, None, None], rows.context.layout.width
        if form == "factor":
            return Entries(rank, torch.full_like(position_M11, rank), None)
        offset_K = torch.arange(width, device=position_M11.device)
        return Entries(width, position_M11 + 1, offset_K <= position_M11)

    def mask(self, x_MHK: Tensor) -> Tensor:
        """Exactly 0 at entries that do not exist."""
        return x_MHK if self.valid_M1K is None else x_MHK.masked_fill(~self.valid_M1K, 0.0)

    def mean_square(self, x_MHK: Tensor) -> Tensor:
        """Mean of x² over the valid entries of each row and head: [M, H, K] (0 at invalid ones) → [M, H, 1]."""
        return x_MHK.square().sum(-1, keepdim=True) / self.count_M11.to(x_MHK.dtype)

    def rms(self, x_MHK: Tensor) -> Tensor:
        """x / √(mean x² + 1e-2) over the valid entries of each row and head."""
        if self.valid_M1K is None:
            return F.rms_norm(x_MHK, (self.width,), eps=1e-2)
        return x_MHK * torch.rsqrt(self.mean_square(x_MHK) + 1e-2)

    def normal(self, key_M: Tensor, heads: int, like: Tensor) -> Tensor:
        """Standard normals at the valid entries, keyed by token, head and entry: [M, H, K] in the dtype of `like`."""
        key_MH = derive(key_M[:, None], torch.arange(heads, device=key_M.device))
        assert isinstance(key_MH, Tensor)
        return self.mask(normal(key_MH, self.width).to(like.dtype))


class ToEntries(nn.Module):
    """Linear map to the entries of every head: [M, I] → [M, H, K] for any K up to the width it was built for."""

    def __init__(self, inputs: int, heads: int, entries: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(heads, entries, inputs))
        self.bias = nn.Parameter(torch.zeros(heads, entries))
        nn.init.xavier_uniform_(self.weight.data.view(heads * entries, inputs))

    def forward(self, x_MI: Tensor, width: int) -> Tensor:
        heads, _, inputs = self.weight.shape
        weight, bias = self.weight[:, :width].reshape(-1, inputs), self.bias[:, :width].reshape(-1)
        return F.linear(x_MI, weight, bias).view(-1, heads, width)
