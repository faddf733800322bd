"""V-GenAtt: each row's map is decoded from a Gaussian latent of the encoder state (MATH §4).

Legend: N real tokens, M rows that are made, D hidden width d, Z latent width d_z, H heads,
K entries of a generated row.
"""

from __future__ import annotations

from torch import Tensor

from genatt_dist.attention.base import Generated, Generator, Rows, condition
from genatt_dist.attention.decoder import Decoder, Latent, Posterior, free_bits
from genatt_dist.attention.entries import Entries, row_width
from genatt_dist.attention.logits import GeneratedLogits, Values
from genatt_dist.attention.noise import Purpose, normal
from genatt_dist.attention.options import VariationalAttention
from genatt_dist.config import ModelConfig
from genatt_dist.model.context import Context


class Variational(Generator):
    """z_i ~ q(z | S_i), g_i = Dec(z_i; c_i).

    Training draws one z. Evaluation takes z = μ (`mean`), one draw (`sample`), or the mean of M maps in the last block
    with z = μ in earlier ones (`mc`).
    """

    def __init__(self, model: ModelConfig, attention: VariationalAttention, max_len: int, block: int) -> None:
        super().__init__()
        self.config, self.block = attention, block
        self.last = block == model.num_blocks - 1 or model.share_map
        self.latent = Latent(model.hidden_size, attention.latent_size)
        self.decoder = Decoder(model, attention, row_width(attention, max_len))
        self.logits = GeneratedLogits(model, attention, max_len)
        self.values = Values(model, attention.value_projection)

    def forward(
        self, x_ND: Tensor, s_ND: Tensor | None, context: Context, sample: bool = False, last: bool = False
    ) -> Generated:
        assert s_ND is not None, "generated attention needs the encoder states S"
        rows = Rows.of(context, last)
        entries = Entries.of(self.config.form, self.config.rank, rows)
        c_MD = condition(s_ND, self.config.condition, rows)
        posterior, x_MD = self.latent(c_MD), rows.take(x_ND)
        samples = [self.decoder(z_MZ, c_MD, x_MD, entries) for z_MZ in self._latents(posterior, rows, sample)]
        maps, statistics = self.logits(samples, x_ND, s_ND, rows)
        kl_Z = posterior.kl_Z()
        loss = free_bits(kl_Z, self.config.free_bits, context) if self.training else kl_Z.new_zeros(())
        return Generated(maps, self.values(x_ND), loss, {**statistics, "kl_Z": kl_Z.detach()}, last)

    def _latents(self, posterior: Posterior, rows: Rows, sample: bool) -> list[Tensor]:
        inference = "sample" if self.training or sample else self.config.inference
        if inference == "mean" or (inference == "mc" and not self.last):
            return [posterior.mu_MZ]
        noise = rows.noise("sampling the latent of V-GenAtt")
        draws = self.config.mc_samples if inference == "mc" else 1
        keys = [noise.token(Purpose.LATENT, self.block, draw) for draw in range(draws)]
        return [posterior.sample(normal(key_M, self.config.latent_size)) for key_M in keys]
