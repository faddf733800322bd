"""The denoiser R̂_0 = D(R_t, S, t) of D-GenAtt, the scale ς of what it denoises, and its table of times (MATH §5).

Legend: M rows that are made (in training all N real tokens), G denoiser width d_h, H heads, K entries of a generated
row, T diffusion steps, F = 32 sinusoids.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from genatt_dist.attention import schedule
from genatt_dist.attention.base import Float32Buffers, linear, widen
from genatt_dist.attention.entries import Entries, FromEntries, ToEntries
from genatt_dist.attention.options import DiffusionAttention
from genatt_dist.config import ModelConfig
from genatt_dist.model.context import Context

SINUSOIDS = 32
MOMENTUM = 0.99  # [D] ς averages about the last hundred batches.


class Times(Float32Buffers):
    """ᾱ_t and the sinusoids of 1000u, u = t/T, for t = 0..T."""

    alpha_bar_T: Tensor
    tau_TF: Tensor

    def __init__(self, kind: str, num_steps: int) -> None:
        super().__init__()
        self.alpha_bar = schedule.alpha_bar(kind, num_steps)
        time_T1 = 1000 * torch.arange(num_steps + 1)[:, None] / num_steps
        frequency_F = torch.exp(-math.log(10_000) * torch.arange(SINUSOIDS // 2) / (SINUSOIDS // 2))
        angle_TF = time_T1 * frequency_F
        self.register_buffer("alpha_bar_T", torch.tensor(self.alpha_bar), persistent=False)
        self.register_buffer("tau_TF", torch.cat((angle_TF.sin(), angle_TF.cos()), dim=-1), persistent=False)


class Denoiser(nn.Module):
    """h = GELU(W_g R_t + W_s S_i + W_τ τ(t) + b); h ← h + GELU(W_2 h); R̂_0 = W_3 h: row by row, its heads together."""

    def __init__(self, model: ModelConfig, attention: DiffusionAttention, entries: int) -> None:
        super().__init__()
        width = attention.generator_size
        self.w_g = FromEntries(model.num_heads, entries, width)
        self.w_s = linear(model.hidden_size, width, bias=False)
        self.w_tau = linear(SINUSOIDS, width)  # its bias is b
        self.w_2 = linear(width, width)
        self.w_3 = ToEntries(width, model.num_heads, entries)

    def forward(self, r_MHK: Tensor, given_MG: Tensor, entries: Entries) -> Tensor:
        """given_MG: W_s S_i + W_τ τ(t) + b, whose parts do not change from step to step and are computed once."""
        h_MG = F.gelu(self.w_g(r_MHK, given_MG))
        h_MG = h_MG + F.gelu(self.w_2(h_MG))
        return entries.mask(self.w_3(h_MG, entries.width))


class ResidualScale(Float32Buffers):
    """ς: running RMS of g_0 − m over the valid entries of the global batch. 1 until the first update, which sets it."""

    mean_square: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean_square", torch.zeros(()))

    def forward(self) -> Tensor:
        return torch.where(self.mean_square > 0, self.mean_square, 1.0).sqrt()

    @torch.no_grad()
    def update(self, residual_MHK: Tensor, entries: Entries, context: Context) -> None:
        """After use: rows of a batch must not see each other through a statistic of that batch."""
        sum_, count = widen(residual_MHK).square().sum().float(), entries.count_M11.sum() * residual_MHK.shape[1]
        sum_, count = context.total(torch.stack((sum_, count.float())))
        batch = sum_ / count
        running = MOMENTUM * self.mean_square + (1 - MOMENTUM) * batch
        self.mean_square.copy_(torch.where(self.mean_square > 0, running, batch))
