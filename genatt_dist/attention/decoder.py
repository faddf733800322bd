"""What both generative attentions share: the latent z, its KL with free bits, and the decoder (MATH §4).

Legend: M rows that are made (in training all N real tokens), D hidden width d, Z latent width d_z, C width of what is
given, H heads, K entries of a generated row, I and O widths.
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
        return self.mu_MZ + torch.exp(0.5 * self.log_var_MZ) * eps_MZ.to(self.mu_MZ.dtype)

    def kl_MZ(self) -> Tensor:
        """½(μ² + σ² − 1 − log σ²), each token and dimension by itself, at least float32."""
        mu_MZ, log_var_MZ = widen(self.mu_MZ), widen(self.log_var_MZ)
        return 0.5 * (mu_MZ.square() + log_var_MZ.exp() - 1 - log_var_MZ)


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


def free_bits(kl_MZ: Tensor, floor: float, context: Context) -> Tensor:
    """This part's share of (1/d_z) Σ_j max(λ, KL_j), with KL_j the mean over the real tokens of the *global* batch [D].

    Which dimensions lie above λ is decided by all parts together. There the share is this part's sum, and carries the
    gradient; below, it is λ times this part's fraction of the tokens. So shares add up, and their gradients too.
    """
    share_Z = kl_MZ.sum(0) / context.num_tokens
    above_Z = context.total(share_Z.detach()) > floor
    constant = floor * kl_MZ.shape[0] / context.num_tokens.to(share_Z.dtype)
    return torch.where(above_Z, share_Z, constant).mean()


class Onto(nn.Module):
    """x Wᵀ added to what is given, in one pass: [M, I], [M, O] → [M, O]."""

    def __init__(self, weight_OI: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight_OI)

    def forward(self, x_MI: Tensor, given_MO: Tensor) -> Tensor:
        return torch.addmm(given_MO, x_MI, self.weight.T)


class Decoder(nn.Module):
    """g_i = MLP[z_i ; c_i], c_i = S_i [P], [S_i; X_i] or nothing [D]; one GELU layer of d_h, or linear.

    What c contributes, W_c c + b, is the same for every z: `given` is computed once and W_z z added to it.
    """

    def __init__(self, model: ModelConfig, attention: DecodedAttention, entries: int) -> None:
        super().__init__()
        self.input = attention.decoder_input
        latent = attention.latent_size
        width = latent + model.hidden_size * {"latent": 0, "states": 1, "states_items": 2}[self.input]
        self.w_z: nn.Module | None = None
        self.w_c: nn.Module | None = None
        if attention.decoder == "mlp":
            hidden = attention.generator_size
            whole = linear(width, hidden)  # one matrix of [z; c], in two parts where there is a c
            self.w_z = whole
            if width > latent:
                self.w_z, self.w_c = Onto(whole.weight.data[:, :latent].clone()), nn.Linear(width - latent, hidden)
                self.w_c.weight.data, self.w_c.bias.data = whole.weight.data[:, latent:].clone(), whole.bias.data
        self.output = ToEntries(attention.generator_size if self.w_z else width, model.num_heads, entries)

    def given(self, s_MD: Tensor, x_MD: Tensor) -> Tensor | None:
        """What all z of a row share: W_c c + b, or c itself where the decoder is linear; None where there is no c."""
        if self.input == "latent":
            return None
        c_MC = s_MD if self.input == "states" else torch.cat((s_MD, x_MD), dim=-1)
        return self.w_c(c_MC) if self.w_c else c_MC

    def forward(self, z_MZ: Tensor, given_MC: Tensor | None, entries: Entries) -> Tensor:
        """[M, Z] → g [M, H, K], 0 at entries that do not exist."""
        given = () if given_MC is None else (given_MC,)
        h_MC = F.gelu(self.w_z(z_MZ, *given)) if self.w_z else torch.cat((z_MZ, *given), dim=-1)
        return entries.mask(self.output(h_MC, entries.width))
