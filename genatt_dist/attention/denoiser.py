"""The denoiser R̂_0 = D(R_t, S, t) of D-GenAtt, the scale ς of what it denoises, and its table of times (MATH §5).

Legend: M rows that are made (in training all N real tokens), G denoiser width d_h, H heads, K entries of a generated
row, T diffusion steps, F = 32 sinusoids.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from genatt_dist.attention import schedule
from genatt_dist.attention.base import Float32Buffers, linear, widen
from genatt_dist.attention.entries import Entries, ToEntries
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


class Input(nn.Module):
    """W_g R_t + W_s S_i + W_τ τ(t) + b, or any of its parts.

    Training needs all of it once: one product of [R; S; τ]. Sampling makes the parts that do not change once.
    """

    def __init__(self, heads: int, entries: int, hidden_size: int, outputs: int) -> None:
        super().__init__()
        self.w_g = nn.Parameter(nn.init.xavier_uniform_(torch.empty(outputs, heads * entries)))
        self.w_s = nn.Parameter(nn.init.xavier_uniform_(torch.empty(outputs, hidden_size)))
        self.w_tau = nn.Parameter(nn.init.xavier_uniform_(torch.empty(outputs, SINUSOIDS)))
        self.b = nn.Parameter(torch.zeros(outputs))
        self.heads = heads

    def forward(
        self, r_MHK: Tensor | None = None, s_MD: Tensor | None = None, tau_MF: Tensor | None = None, onto: Any = None
    ) -> Tensor:
        """The parts that are given, summed: [M, G]. onto: what was made before (b is in τ's part), [M, G]."""
        inputs, weights = [], []
        if r_MHK is not None:
            width = r_MHK.shape[-1]  # narrower batches have the first offsets alone
            inputs.append(r_MHK.flatten(1))
            weights.append(self.w_g.unflatten(1, (self.heads, -1))[..., :width].flatten(1))
        if s_MD is not None:
            inputs.append(s_MD)
            weights.append(self.w_s)
        if tau_MF is not None:
            inputs.append(tau_MF)
            weights.append(self.w_tau)
        x_MI, weight_GI = (part[0] if len(part) == 1 else torch.cat(part, dim=1) for part in (inputs, weights))
        if onto is not None:
            return torch.addmm(onto, x_MI, weight_GI.T)
        return F.linear(x_MI, weight_GI, self.b if tau_MF is not None else None)


class Denoiser(nn.Module):
    """h = GELU(W_g R_t + W_s S_i + W_τ τ(t) + b); h ← h + GELU(W_2 h); R̂_0 = W_3 h: row by row, its heads together."""

    def __init__(self, model: ModelConfig, attention: DiffusionAttention, entries: int) -> None:
        super().__init__()
        width = attention.generator_size
        self.input = Input(model.num_heads, entries, model.hidden_size, width)
        self.w_2 = linear(width, width)
        self.w_3 = ToEntries(width, model.num_heads, entries)

    def forward(self, h_MG: Tensor, entries: Entries) -> Tensor:
        """R̂_0 [M, H, K] from what `input` made."""
        h_MG = F.gelu(h_MG)
        h_MG = h_MG + F.gelu(self.w_2(h_MG))
        return entries.mask(self.w_3(h_MG, entries.width))


class ResidualScale(Float32Buffers):
    """ς: running RMS of g_0 − m over the valid entries of the diffused rows of the global batch. 1 until the first
    update, which sets it.
    """

    mean_square: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean_square", torch.zeros(()))

    def forward(self) -> Tensor:
        return torch.where(self.mean_square > 0, self.mean_square, 1.0).sqrt()

    @torch.no_grad()
    def update(self, residual_MHK: Tensor, counted_M11: Tensor, entries: Entries, context: Context) -> None:
        """After use: rows of a batch must not see each other through a statistic of that batch. counted_M11: rows that
        are diffused, others have no part in it.
        """
        sum_ = (widen(residual_MHK).square() * counted_M11).sum().float()
        count = (entries.count_M11 * counted_M11).sum() * residual_MHK.shape[1]
        sum_, count = context.total(torch.stack((sum_, count.float())))
        batch = sum_ / count.clamp(min=1)
        running = MOMENTUM * self.mean_square + (1 - MOMENTUM) * batch
        started = torch.where(self.mean_square > 0, running, batch)
        self.mean_square.copy_(torch.where(count > 0, started, self.mean_square))
