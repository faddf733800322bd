"""What both generative attentions share: the latent z, its KL with free bits, and the decoder (MATH §4).

Legend: M rows that are made (in training all N real tokens), D hidden width d, Z latent width d_z, C width of [z; c],
H heads, K entries of a generated row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from genatt_dist.attention.base import linear, widen
from genatt_dist.attention.entries import Entries, ToEntries
from genatt_dist.attention.options import DecodedAttention
from genatt_dist.config import ModelConfig
from genatt_dist.model.context import Context


@dataclass(frozen=True)
class Posterior:
    """q(z_i | S_i) = N(μ_i, diag σ_i²); the prior is N(0, I) [P]."""

    mu_MZ: Tensor
    log_var_MZ: Tensor

    def sample(self, eps_MZ: Tensor) -> Tensor:
        """z = μ + σ ⊙ ε"""
        return torch.addcmul(self.mu_MZ, torch.exp(0.5 * self.log_var_MZ), eps_MZ.to(self.mu_MZ.dtype))

    def kl_Z(self) -> Tensor:
        """½(μ² + σ² − 1 − log σ²) of each dimension, summed over the rows in at least float32."""
        mu_MZ, log_var_MZ = widen(self.mu_MZ), widen(self.log_var_MZ)
        return 0.5 * (mu_MZ.square().sum(0) + log_var_MZ.exp().sum(0) - log_var_MZ.sum(0) - len(mu_MZ))


class Latent(nn.Module):
    """μ_i = W_μ S_i + b_μ and log σ_i² = clip(W_σ S_i + b_σ, −8, 4)."""

    def __init__(self, hidden_size: int, latent_size: int) -> None:
        super().__init__()
        self.w = nn.Linear(hidden_size, 2 * latent_size)  # [W_μ; W_σ]
        nn.init.zeros_(self.w.bias)
        for part in self.w.weight.data.chunk(2):
            nn.init.xavier_uniform_(part)

    def forward(self, s_MD: Tensor) -> Posterior:
        mu_MZ, log_var_MZ = self.w(s_MD).chunk(2, dim=-1)
        return Posterior(mu_MZ, log_var_MZ.clamp(-8, 4))


def free_bits(kl_Z: Tensor, floor: float, context: Context) -> Tensor:
    """This part's share of (1/d_z) Σ_j max(λ, KL_j), with KL_j the mean over the real tokens of the *global* batch [D].

    kl_Z: this part's sums over its tokens. Which dimensions lie above λ is decided by all parts together. There the
    share is this part's sum, and carries the gradient; below, it is λ times this part's fraction of the tokens. So
    shares add up, and their gradients too.
    """
    share_Z = kl_Z / context.num_tokens
    above_Z = context.total(share_Z.detach()) > floor
    constant = floor * context.layout.row_N.shape[0] / context.num_tokens.to(share_Z.dtype)
    return torch.where(above_Z, share_Z, constant).mean()


class Decoder(nn.Module):
    """g_i = MLP[z_i ; c_i], c_i = S_i [P], [S_i; X_i] or nothing [D]; one GELU layer of d_h, or linear."""

    def __init__(self, model: ModelConfig, attention: DecodedAttention, entries: int) -> None:
        super().__init__()
        self.input = attention.decoder_input
        width = attention.latent_size + model.hidden_size * {"latent": 0, "states": 1, "states_items": 2}[self.input]
        self.hidden = linear(width, attention.generator_size) if attention.decoder == "mlp" else None
        self.output = ToEntries(attention.generator_size if self.hidden else width, model.num_heads, entries)

    def forward(self, z_MZ: Tensor, s_MD: Tensor, x_MD: Tensor, entries: Entries) -> Tensor:
        """[M, Z] → g [M, H, K], 0 at entries that do not exist."""
        given = {"latent": (), "states": (s_MD,), "states_items": (s_MD, x_MD)}[self.input]
        h_MC = torch.cat((z_MZ, *given), dim=-1)
        if self.hidden is not None:
            h_MC = F.gelu(self.hidden(h_MC))
        return entries.mask(self.output(h_MC, entries.width))
