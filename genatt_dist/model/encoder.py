"""The sequence encoder S = GRU(X⁰): one pass that conditions the maps of all blocks (MATH §2).

Legend: B sequences, n width of the batch, N real tokens, D hidden width d.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from genatt_dist.model.jagged import Jagged
from genatt_dist.model.recurrence import gru


class Encoder(nn.GRU):
    """S = GRU(X⁰). Padding lies to the right, so it never reaches a real token's state; on a CPU there is none."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__(hidden_size, hidden_size, batch_first=True)

    def forward(self, x_ND: Tensor, layout: Jagged) -> Tensor:  # type: ignore[override]
        if x_ND.is_cuda:  # ordering asks the device for the lengths and waits; cuDNN is fast enough to pad
            s_BnD, _ = super().forward(layout.pad(x_ND))
            return layout.unpad(s_BnD)
        place_N, active_n = _by_position(layout)
        ordered_ND = torch.zeros_like(x_ND).index_copy(0, place_N, x_ND)
        w_ih, w_hh, b_ih, b_hh = self.all_weights[0]
        return gru(ordered_ND, w_ih, w_hh, b_ih, b_hh, active_n.tolist()).index_select(0, place_N)


def _by_position(layout: Jagged) -> tuple[Tensor, Tensor]:
    """Where each token stands when tokens are ordered by position, longest sequences first; how many reach each."""
    active_n = torch.bincount(layout.position_N)
    first_n = active_n.cumsum(0) - active_n
    rank_B = layout.lengths_B.argsort(descending=True, stable=True).argsort()
    return first_n[layout.position_N] + rank_B[layout.row_N], active_n
