"""Control: the generator of V-GenAtt with σ = 0, trained so: g_i = Dec(μ(S_i); c_i) (MATH §6).

Legend: N real tokens, D hidden width d, H heads, K entries of a generated row.
"""

from __future__ import annotations

from torch import Tensor

from genatt_dist.attention.base import Generated, Generator, Rows, condition, linear
from genatt_dist.attention.decoder import Decoder
from genatt_dist.attention.entries import Entries, row_width
from genatt_dist.attention.logits import GeneratedLogits, Values
from genatt_dist.attention.options import DeterministicAttention
from genatt_dist.config import ModelConfig
from genatt_dist.model.context import Context


class Deterministic(Generator):
    """No latent is drawn and no prior pulls: whatever V-GenAtt gains over this, its randomness gains."""

    def __init__(self, model: ModelConfig, attention: DeterministicAttention, max_len: int) -> None:
        super().__init__()
        self.config = attention
        self.w_mu = linear(model.hidden_size, attention.latent_size)
        self.decoder = Decoder(model, attention, row_width(attention, max_len))
        self.logits = GeneratedLogits(model, attention, max_len)
        self.values = Values(model, attention.value_projection)

    def forward(
        self, x_ND: Tensor, s_ND: Tensor | None, context: Context, sample: bool = False, last: bool = False
    ) -> Generated:
        assert s_ND is not None, "generated attention needs the encoder states S"
        rows = Rows.of(context, last)
        c_MD = condition(s_ND, self.config.condition, rows)
        entries = Entries.of(self.config.form, self.config.rank, rows)
        g_MHK = self.decoder(self.w_mu(c_MD), c_MD, rows.take(x_ND), entries)
        maps, statistics = self.logits([g_MHK], x_ND, s_ND, rows)
        return Generated(maps, self.values(x_ND), context.num_tokens.new_zeros(()), statistics, last)
