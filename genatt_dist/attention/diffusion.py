"""D-GenAtt: each row's map is denoised from Gaussian noise (MATH §5; all of it but the idea is [D]).

Legend: B sequences, N real tokens, D hidden width d, Z latent width d_z, G denoiser width d_h, H heads, K entries of a
generated row. g_0 is the clean row, m its mean, R_0 = (g_0 − m)/ς the residual that is diffused, R_t its noised form,
R̂_0 the denoised one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from genatt_dist.attention import sampler
from genatt_dist.attention.base import Generated, Generator, condition, widen
from genatt_dist.attention.decoder import Decoder, Latent, Posterior, free_bits, rms
from genatt_dist.attention.denoiser import Denoiser, ResidualScale, Times
from genatt_dist.attention.entries import Entries
from genatt_dist.attention.logits import GeneratedLogits, Values
from genatt_dist.attention.noise import NoiseKey, Purpose, integers, normal, uniform
from genatt_dist.config import DiffusionAttention, ModelConfig
from genatt_dist.model.context import Context


@dataclass(frozen=True)
class _Rows:
    """What all rows of one call share: the conditioning of decoder and denoiser."""

    posterior: Posterior
    c_ND: Tensor
    x_ND: Tensor
    entries: Entries


class Diffusion(Generator):
    """Training learns the law of R_0; it ranks a share ρ of the sequences by a denoised row, the others by g_0.

    Evaluation samples with S steps of DDIM, or takes m in all but the last block (`sample_blocks=last`).
    """

    def __init__(self, model: ModelConfig, attention: DiffusionAttention, max_len: int, block: int) -> None:
        super().__init__()
        self.config, self.block, self.heads = attention, block, model.num_heads
        self.samples = attention.sample_blocks == "all" or block == model.num_blocks - 1
        width = attention.rank if attention.form == "factor" else max_len
        self.latent = Latent(model.hidden_size, attention.latent_size)
        self.decoder = Decoder(model, attention, width)
        self.denoiser = Denoiser(model, attention, width)
        self.times = Times(attention.schedule, attention.diffusion_steps)
        self.residual_scale = ResidualScale()
        self.logits = GeneratedLogits(model, attention, max_len)
        self.values = Values(model, attention.value_projection)

    def forward(self, x_ND: Tensor, s_ND: Tensor | None, context: Context, sample: bool = False) -> Generated:
        assert s_ND is not None, "generated attention needs the encoder states S"
        entries = Entries.of(self.config.form, self.config.rank, context.layout)
        c_ND = condition(s_ND, self.config.condition, context.layout)
        rows = _Rows(self.latent(c_ND), c_ND, x_ND, entries)
        kl_NZ, scale = rows.posterior.kl_NZ(), self._scale()
        if self.training:
            g_NHK, loss = self._train(rows, scale, context)
            loss = loss + self.config.latent_weight * free_bits(kl_NZ, self.config.free_bits, context)
        else:
            sampled = self.samples or sample
            g_NHK = self._sample(rows, scale, context) if sampled else self._clean(rows.posterior.mu_NZ, rows)
            loss = kl_NZ.new_zeros(())
        maps, statistics = self.logits([g_NHK], x_ND, s_ND, context.layout)
        statistics |= {"kl_Z": kl_NZ.detach().sum(0), "residual_scale": scale}
        return Generated(maps, self.values(x_ND), loss, statistics)

    def _train(self, rows: _Rows, scale: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        """The row each sequence is ranked by, and this part's share of E clip(SNR_t, 1, 5)·mean_valid (R̂_0 − R_0)².

        The mean is over a row's valid entries, then over heads and tokens [D].
        """
        noise, layout = context.noise_for("training D-GenAtt"), context.layout
        z_NZ = rows.posterior.sample(normal(noise.token(Purpose.LATENT, self.block, 0), self.config.latent_size))
        g0_NHK, m_NHK = self._clean(z_NZ, rows), self._mean(rows)
        # Nothing but the denoiser and S learns from L_gen: a target that followed it could make itself easy.
        residual_NHK = (g0_NHK - m_NHK).detach()
        r0_NHK = residual_NHK / scale.to(residual_NHK.dtype)

        t_N = self._draw_t(noise)[layout.row_N]
        alpha_bar_N11 = self.times.alpha_bar_T[t_N, None, None]
        eps_NHK = rows.entries.normal(noise.token(Purpose.DIFFUSION, self.block), self.heads, like=r0_NHK)
        denoised_NHK = self._denoise(rows)(sampler.diffuse(r0_NHK, eps_NHK, alpha_bar_N11), t_N)

        weight_N11 = (alpha_bar_N11 / (1 - alpha_bar_N11)).clamp(1, 5)
        error_NH1 = weight_N11 * rows.entries.mean_square(widen(denoised_NHK - r0_NHK))
        loss = error_NH1.mean(1).sum() / context.num_tokens
        if not self.config.literal:
            self.residual_scale.update(residual_NHK, rows.entries, context)

        if self.config.train_sampler == "unrolled":
            ranked_NHK = self._sample(rows, scale, context, steps=self.config.diffusion_steps)
        else:
            ranked_NHK = m_NHK + scale.to(m_NHK.dtype) * denoised_NHK
        # The draw knows no block: all blocks of a sequence rank it the same way.
        mixed_B1 = uniform(noise.sequence(Purpose.MIXTURE, 0), 1) < self.config.rec_mix
        return torch.where(mixed_B1[layout.row_N, :, None], ranked_NHK, g0_NHK), loss

    def _sample(self, rows: _Rows, scale: Tensor, context: Context, steps: int | None = None) -> Tensor:
        """g = m + ςR̂_0, with R̂_0 sampled by DDIM: [N, H, K]."""
        noise, num_steps = context.noise_for("sampling D-GenAtt"), self.config.diffusion_steps
        m_NHK = self._mean(rows)

        def draw(t: int) -> Tensor:
            return rows.entries.normal(noise.token(Purpose.SAMPLER, self.block, t), self.heads, like=m_NHK)

        times = sampler.times(num_steps, steps or self.config.sampling_steps)
        clean_NHK = sampler.sample(self._denoise(rows), draw, self.times.alpha_bar, times, self.config.eta)
        return m_NHK + scale.to(m_NHK.dtype) * clean_NHK

    def _denoise(self, rows: _Rows) -> Callable[[Tensor, Tensor | int], Tensor]:
        """D(·, S, ·) of R_t and t (one for all rows, or [N]), with W_s S + b and the table of W_τ τ computed once."""
        s_NG = self.denoiser.w_s(rows.c_ND)
        tau_TG = self.denoiser.w_tau(self.times.tau_TF.to(s_NG.dtype))
        return lambda r_NHK, t: self.denoiser(r_NHK, s_NG + tau_TG[t], rows.entries)

    def _clean(self, z_NZ: Tensor, rows: _Rows) -> Tensor:
        """rms(Dec(z)): [N, H, K]"""
        return rms(self.decoder(z_NZ, rows.c_ND, rows.x_ND, rows.entries), rows.entries)

    def _mean(self, rows: _Rows) -> Tensor:
        """m = stopgrad(rms(Dec(μ))), 0 in `literal` mode."""
        with torch.no_grad():
            m_NHK = self._clean(rows.posterior.mu_NZ, rows)
            return torch.zeros_like(m_NHK) if self.config.literal else m_NHK

    def _scale(self) -> Tensor:
        """ς, 1 in `literal` mode: float32 scalar, no gradient."""
        scale = self.residual_scale()
        return torch.ones_like(scale) if self.config.literal else scale

    def _draw_t(self, noise: NoiseKey) -> Tensor:
        """One t for each sequence: T with probability ¼ (few-step sampling rests on it), else uniform on 1..T. [B]"""
        num_steps, key = self.config.diffusion_steps, (Purpose.DIFFUSION_STEP, self.block)
        end_B = uniform(noise.sequence(*key, 0), 1).squeeze(-1) < 0.25
        return torch.where(end_B, num_steps, 1 + integers(noise.sequence(*key, 1), 1, num_steps).squeeze(-1))
