"""The sequence encoder S = GRU(X⁰): one pass that conditions the maps of all blocks (MATH §2).

Legend: B sequences, n width of the batch, N real tokens, D hidden width d.
"""

from __future__ import annotations

from torch import Tensor, nn

from genatt_dist.model.jagged import Jagged


class Encoder(nn.Module):
    """S = GRU(X⁰). Padding lies to the right, so it never reaches a real token's state."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.gru = nn.GRU(hidden_size, hidden_size, batch_first=True)

    def forward(self, x_ND: Tensor, layout: Jagged) -> Tensor:
        s_BnD, _ = self.gru(layout.pad(x_ND))
        return layout.unpad(s_BnD)
