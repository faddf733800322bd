"""What both generative attentions share: the latent z, its KL with free bits, the decoder, and rms (MATH §4, §5).

Legend: N real tokens, D hidden width d, Z latent width d_z, C width of [z; c], H heads, K entries of a generated row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from genatt_dist.attention.base import linear, widen
from genatt_dist.attention.entries import Entries, ToEntries
from genatt_dist.config import DiffusionAttention, ModelConfig, VariationalAttention
from genatt_dist.model.context import Context


@dataclass(frozen=True)
class Posterior:
    """q(z_i | S_i) = N(μ_i, diag σ_i²); the prior is N(0, I) [P]."""

    mu_NZ: Tensor
    log_var_NZ: Tensor

    def sample(self, eps_NZ: Tensor) -> Tensor:
        """z = μ + σ ⊙ ε"""
        return self.mu_NZ + torch.exp(0.5 * self.log_var_NZ) * eps_NZ.to(self.mu_NZ.dtype)

    def kl_NZ(self) -> Tensor:
        """½(μ² + σ² − 1 − log σ²), each token and dimension by itself, at least float32."""
        mu_NZ, log_var_NZ = widen(self.mu_NZ), widen(self.log_var_NZ)
        return 0.5 * (mu_NZ.square() + log_var_NZ.exp() - 1 - log_var_NZ)


class Latent(nn.Module):
    """μ_i = W_μ S_i + b_μ and log σ_i² = clip(W_σ S_i + b_σ, −8, 4)."""

    def __init__(self, hidden_size: int, latent_size: int) -> None:
        super().__init__()
        self.w_mu = linear(hidden_size, latent_size)
        self.w_sigma = linear(hidden_size, latent_size)

    def forward(self, s_ND: Tensor) -> Posterior:
        return Posterior(self.w_mu(s_ND), self.w_sigma(s_ND).clamp(-8, 4))


def free_bits(kl_NZ: Tensor, floor: float, context: Context) -> Tensor:
    """This part's share of (1/d_z) Σ_j max(λ, KL_j), with KL_j the mean over the real tokens of the *global* batch [D].

    Which dimensions lie above λ is decided by all parts together. There the share is this part's sum, and carries the
    gradient; below, it is λ times this part's fraction of the tokens. So shares add up, and their gradients too.
    """
    share_Z = kl_NZ.sum(0) / context.num_tokens
    above_Z = context.total(share_Z.detach()) > floor
    constant = floor * kl_NZ.shape[0] / context.num_tokens.to(share_Z.dtype)
    return torch.where(above_Z, share_Z, constant).mean()


class Decoder(nn.Module):
    """g_i = MLP[z_i ; c_i], c_i = S_i [P], [S_i; X_i] or nothing [D]; one GELU layer of d_h, or linear."""

    def __init__(self, model: ModelConfig, attention: VariationalAttention | DiffusionAttention, entries: int) -> None:
        super().__init__()
        self.input = attention.decoder_input
        width = attention.latent_size + model.hidden_size * {"latent": 0, "states": 1, "states_items": 2}[self.input]
        self.hidden = linear(width, attention.generator_size) if attention.decoder == "mlp" else None
        self.output = ToEntries(attention.generator_size if self.hidden else width, model.num_heads, entries)

    def forward(self, z_NZ: Tensor, s_ND: Tensor, x_ND: Tensor, entries: Entries) -> Tensor:
        """[N, Z] → g [N, H, K], 0 at entries that do not exist."""
        given = {"latent": (), "states": (s_ND,), "states_items": (s_ND, x_ND)}[self.input]
        h_NC = torch.cat((z_NZ, *given), dim=-1)
        if self.hidden is not None:
            h_NC = F.gelu(self.hidden(h_NC))
        return entries.mask(self.output(h_NC, entries.width))


def rms(x_NHK: Tensor, entries: Entries) -> Tensor:
    """x / √(mean x² + 1e-2) over the valid entries of each row and head."""
    return x_NHK * torch.rsqrt(entries.mean_square(x_NHK) + 1e-2)
