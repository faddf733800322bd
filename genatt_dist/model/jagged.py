"""Where the real tokens of a batch lie: position-wise layers see N real tokens, only attention sees padding.

Legend: B sequences, n longest length in the batch, N = Σ lengths real tokens, D any width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Jagged:
    """The layout of a batch of sequences of unequal length, real tokens first, sequence after sequence.

    lengths_B: int64, each ≥ 1. width: n ≥ max length (a Python int, so that no step waits for the device).
    row_N, position_N: sequence and position of each real token.
    """

    lengths_B: Tensor
    width: int
    row_N: Tensor
    position_N: Tensor

    @staticmethod
    def of(lengths_B: Tensor, width: int, total: int) -> Jagged:
        """Layout for `lengths_B` (sum `total`), padded where needed to `width` columns."""
        row_N = torch.repeat_interleave(lengths_B, output_size=total)
        start_B = lengths_B.cumsum(0) - lengths_B
        position_N = torch.arange(total, device=lengths_B.device) - start_B[row_N]
        return Jagged(lengths_B, width, row_N, position_N)

    @property
    def size(self) -> int:
        """B"""
        return self.lengths_B.shape[0]

    @property
    def last_B(self) -> Tensor:
        """Index into N of each sequence's last real token."""
        return self.lengths_B.cumsum(0) - 1

    def pad(self, x_ND: Tensor) -> Tensor:
        """[N, D] → [B, n, D], zeros at padding."""
        x_MD = x_ND.new_zeros((self.size * self.width, *x_ND.shape[1:]))
        x_MD = x_MD.index_copy(0, self.row_N * self.width + self.position_N, x_ND)
        return x_MD.view(self.size, self.width, *x_ND.shape[1:])

    def unpad(self, x_BnD: Tensor) -> Tensor:
        """[B, n, D] → [N, D], real tokens only."""
        return x_BnD.flatten(0, 1).index_select(0, self.row_N * self.width + self.position_N)
