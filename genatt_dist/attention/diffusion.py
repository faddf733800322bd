"""D-GenAtt: each row's map is denoised from Gaussian noise (MATH §5; all of it but the idea is [D]).

Legend: B sequences, N real tokens, M rows that are made, C rows that are diffused in a training step, D hidden width d,
Z latent width d_z, G denoiser width d_h, F sinusoids, T diffusion steps, H heads, K entries of a generated row. g_0 is
the clean row, m its mean, R_0 = (g_0 − m)/ς the residual that is diffused, R_t its noised form, R̂_0 the denoised one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from genatt_dist.attention import kernels, sampler
from genatt_dist.attention.base import Generated, Generator, Rows, condition, widen
from genatt_dist.attention.decoder import Decoder, Latent, Posterior, free_bits
from genatt_dist.attention.denoiser import Denoiser, ResidualScale, Times
from genatt_dist.attention.entries import Entries, row_width
from genatt_dist.attention.logits import GeneratedLogits, Values
from genatt_dist.attention.noise import NoiseKey, Purpose, derive, integers, normal, uniform
from genatt_dist.attention.options import DiffusionAttention
from genatt_dist.config import ModelConfig
from genatt_dist.model.context import Context


@dataclass(frozen=True)
class _Given:
    """What decoder and denoiser know of the rows they make."""

    rows: Rows
    entries: Entries
    posterior: Posterior
    c_MD: Tensor
    x_MD: Tensor

    def at(self, index_C: Tensor, form: str, rank: int) -> _Given:
        """The same of some of these rows, which are all of the tokens'."""
        rows, posterior = Rows(self.rows.context, index_C), self.posterior
        chosen = Posterior(rows.take(posterior.mu_MZ), rows.take(posterior.log_var_MZ))
        return _Given(rows, Entries.of(form, rank, rows), chosen, rows.take(self.c_MD), rows.take(self.x_MD))


class Diffusion(Generator):
    """Training learns the law of R_0; it ranks a share ρ of the sequences by a denoised row, the others by g_0.

    Evaluation samples with S steps of DDIM, or takes m in all but the last block (`sample_blocks=last`).
    """

    def __init__(self, model: ModelConfig, attention: DiffusionAttention, max_len: int, block: int) -> None:
        super().__init__()
        self.config, self.block, self.heads = attention, block, model.num_heads
        self.samples = attention.sample_blocks == "all" or block == model.num_blocks - 1 or model.share_map
        width = row_width(attention, max_len)
        self.latent = Latent(model.hidden_size, attention.latent_size)
        self.decoder = Decoder(model, attention, width)
        self.denoiser = Denoiser(model, attention, width)
        self.times = Times(attention.schedule, attention.diffusion_steps)
        self.residual_scale = ResidualScale()
        self.logits = GeneratedLogits(model, attention, max_len)
        self.values = Values(model, attention.value_projection)

    def forward(
        self, x_ND: Tensor, s_ND: Tensor | None, context: Context, sample: bool = False, last: bool = False
    ) -> Generated:
        assert s_ND is not None, "generated attention needs the encoder states S"
        rows = Rows.of(context, last)
        c_MD = condition(s_ND, self.config.condition, rows)
        entries = Entries.of(self.config.form, self.config.rank, rows)
        given = _Given(rows, entries, self.latent(c_MD), c_MD, rows.take(x_ND))
        kl_Z, scale = given.posterior.kl_Z(), self._scale()
        if self.training:
            g_MHK, loss = self._train(given, scale)
            loss = loss + self.config.latent_weight * free_bits(kl_Z, self.config.free_bits, context)
        else:
            sampled = self.samples or sample
            g_MHK = self._sample(given, scale) if sampled else self._clean(given.posterior.mu_MZ, given)
            loss = kl_Z.new_zeros(())
        maps, statistics = self.logits([g_MHK], x_ND, s_ND, rows)
        statistics |= {"kl_Z": kl_Z.detach(), "residual_scale": scale}
        return Generated(maps, self.values(x_ND), loss, statistics, last)

    def _train(self, given: _Given, scale: Tensor) -> tuple[Tensor, Tensor]:
        """The row each sequence is ranked by, and this part's share of E clip(SNR_t, 1, 5)·mean_valid (R̂_0 − R_0)².

        The mean is over a row's valid entries, then over heads and tokens [D]. A sequence is diffused with probability
        δ and then weighs 1/δ: an unbiased L_gen that pays for the denoiser only where its map is used [D].
        """
        noise, context = given.rows.noise("training D-GenAtt"), given.rows.context
        eps_NZ = normal(noise.token(Purpose.LATENT, self.block, 0), self.config.latent_size)
        g0_NHK = self._clean(given.posterior.sample(eps_NZ), given)

        # The draw knows no block: all blocks of a sequence rank it the same way.
        draw_B = uniform(noise.sequence(Purpose.MIXTURE, 0), 1).squeeze(-1)
        index_C = self._diffused(draw_B, context)
        given = given if index_C is None else given.at(index_C, self.config.form, self.config.rank)
        row_C, entries, scale_ = given.rows.take(context.layout.row_N), given.entries, scale.to(g0_NHK.dtype)
        # Nothing but the denoiser and S learns from L_gen: a target that followed it could make itself easy.
        g0_CHK, m_CHK = given.rows.take(g0_NHK), self._mean(given)
        residual_CHK = (g0_CHK - m_CHK).detach()
        r0_CHK = residual_CHK / scale_

        t_B = self._draw_t(noise)
        alpha_bar_B = self.times.alpha_bar_T[t_B]
        key_C = given.rows.noise("training D-GenAtt").token(Purpose.DIFFUSION, self.block)
        eps_CHK = entries.normal(key_C, self.heads, like=r0_CHK)
        r_CHK = sampler.diffuse(r0_CHK, eps_CHK, alpha_bar_B[row_C, None, None])
        tau_CF = self.times.tau_TF[t_B[row_C]].to(r0_CHK.dtype)
        denoised_CHK = self.denoiser(self.denoiser.input(r_CHK, given.c_MD, tau_CF), entries)

        weight_B = (alpha_bar_B / (1 - alpha_bar_B)).clamp(1, 5) * (draw_B < self.config.share) / self.config.share
        weight_C11 = weight_B[row_C, None, None] / (entries.count_M11 * self.heads)
        loss = (weight_C11 * widen(denoised_CHK - r0_CHK).square()).sum() / context.num_tokens
        if not self.config.literal:
            self.residual_scale.update(residual_CHK, draw_B[row_C, None, None] < self.config.share, entries, context)

        if self.config.train_sampler == "unrolled":
            ranked_CHK = self._sample(given, scale, steps=self.config.diffusion_steps)
        else:
            ranked_CHK = m_CHK + scale_ * denoised_CHK
        ranked_CHK = torch.where(draw_B[row_C, None, None] < self.config.rec_mix, ranked_CHK, g0_CHK)
        return ranked_CHK if index_C is None else g0_NHK.index_copy(0, index_C, ranked_CHK), loss

    def _diffused(self, draw_B: Tensor, context: Context) -> Tensor | None:
        """Which tokens' rows are diffused; None: all, those of other sequences with weight 0.

        How many depends on the draws, so a GPU would have to wait for it; there the denoiser is cheap.
        """
        if self.config.share == 1 or draw_B.is_cuda:
            return None
        return (draw_B < self.config.share)[context.layout.row_N].nonzero().squeeze(-1)

    def _sample(self, given: _Given, scale: Tensor, steps: int | None = None) -> Tensor:
        """g = m + ςR̂_0, with R̂_0 sampled by DDIM: [M, H, K]. One kernel does all steps where it can."""
        noise, num_steps = given.rows.noise("sampling D-GenAtt"), self.config.diffusion_steps
        m_MHK, s_MG = self._mean(given), self.denoiser.input(s_MD=given.c_MD)
        tau_TG = self.denoiser.input(tau_MF=self.times.tau_TF.to(s_MG.dtype))
        times = sampler.times(num_steps, steps or self.config.sampling_steps)
        schedule = self.times.alpha_bar, times, self.config.eta

        def draw(t: int) -> Tensor:
            key_M = noise.token(Purpose.SAMPLER, self.block, t)
            return given.entries.normal(key_M, self.heads, like=m_MHK)

        def denoise(r_MHK: Tensor, t: int) -> Tensor:
            clean_MHK: Tensor = self.denoiser(self.denoiser.input(r_MHK, onto=s_MG + tau_TG[t]), given.entries)
            return clean_MHK

        words = [int(derive(int(Purpose.SAMPLER), self.block, t)) for t in times]
        clean_MHK = kernels.sample_rows(self.denoiser, s_MG, tau_TG, given.entries, noise.token_N, words, *schedule)
        if clean_MHK is None:
            clean_MHK = sampler.sample(denoise, draw, *schedule)
        return m_MHK + scale.to(m_MHK.dtype) * clean_MHK

    def _clean(self, z_MZ: Tensor, given: _Given) -> Tensor:
        """rms(Dec(z)): [M, H, K]"""
        return given.entries.rms(self.decoder(z_MZ, given.c_MD, given.x_MD, given.entries))

    def _mean(self, given: _Given) -> Tensor:
        """m = stopgrad(rms(Dec(μ))), 0 in `literal` mode."""
        with torch.no_grad():
            if self.config.literal:
                return given.c_MD.new_zeros(len(given.c_MD), self.heads, given.entries.width)
            return self._clean(given.posterior.mu_MZ, given)

    def _scale(self) -> Tensor:
        """ς, 1 in `literal` mode: float32 scalar, no gradient."""
        scale: Tensor = self.residual_scale()
        return torch.ones_like(scale) if self.config.literal else scale

    def _draw_t(self, noise: NoiseKey) -> Tensor:
        """One t for each sequence: T with probability ¼ (few-step sampling rests on it), else uniform on 1..T. [B]"""
        num_steps, key = self.config.diffusion_steps, (Purpose.DIFFUSION_STEP, self.block)
        end_B = uniform(noise.sequence(*key, 0), 1).squeeze(-1) < 0.25
        return torch.where(end_B, num_steps, 1 + integers(noise.sequence(*key, 1), 1, num_steps).squeeze(-1))
