"""V-GenAtt: each row's map is decoded from a Gaussian latent of the encoder state (MATH §4).

Legend: N real tokens, D hidden width d, Z latent width d_z, H heads, K entries of a generated row.
"""

from __future__ import annotations

from torch import Tensor

from genatt_dist.attention.base import Generated, Generator, condition
from genatt_dist.attention.decoder import Decoder, Latent, Posterior, free_bits
from genatt_dist.attention.entries import Entries
from genatt_dist.attention.logits import GeneratedLogits, Values
from genatt_dist.attention.noise import Purpose, normal
from genatt_dist.config import ModelConfig, VariationalAttention
from genatt_dist.model.context import Context


class Variational(Generator):
    """z_i ~ q(z | S_i), g_i = Dec(z_i; c_i).

    Training draws one z. Evaluation takes z = μ (`mean`), one draw (`sample`), or the mean of M maps in the last block
    with z = μ in earlier ones (`mc`).
    """

    def __init__(self, model: ModelConfig, attention: VariationalAttention, max_len: int, block: int) -> None:
        super().__init__()
        self.config, self.block, self.last = attention, block, block == model.num_blocks - 1
        self.latent = Latent(model.hidden_size, attention.latent_size)
        self.decoder = Decoder(model, attention, attention.rank if attention.form == "factor" else max_len)
        self.logits = GeneratedLogits(model, attention, max_len)
        self.values = Values(model, attention.value_projection)

    def forward(self, x_ND: Tensor, s_ND: Tensor | None, context: Context, sample: bool = False) -> Generated:
        assert s_ND is not None, "generated attention needs the encoder states S"
        layout = context.layout
        entries = Entries.of(self.config.form, self.config.rank, layout)
        c_ND = condition(s_ND, self.config.condition, layout)
        posterior = self.latent(c_ND)
        latents = self._latents(posterior, context, sample)
        rows = [self.decoder(z_NZ, c_ND, x_ND, entries) for z_NZ in latents]
        maps, statistics = self.logits(rows, x_ND, s_ND, layout)
        kl_NZ = posterior.kl_NZ()
        loss = free_bits(kl_NZ, self.config.free_bits, context) if self.training else kl_NZ.new_zeros(())
        return Generated(maps, self.values(x_ND), loss, {**statistics, "kl_Z": kl_NZ.detach().sum(0)})

    def _latents(self, posterior: Posterior, context: Context, sample: bool) -> list[Tensor]:
        inference = "sample" if self.training or sample else self.config.inference
        if inference == "mean" or (inference == "mc" and not self.last):
            return [posterior.mu_NZ]
        noise = context.noise_for("sampling the latent of V-GenAtt")
        draws = self.config.mc_samples if inference == "mc" else 1
        keys = [noise.token(Purpose.LATENT, self.block, draw) for draw in range(draws)]
        return [posterior.sample(normal(key_N, self.config.latent_size)) for key_N in keys]
