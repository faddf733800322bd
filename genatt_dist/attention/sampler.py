"""The forward process, and DDIM: from noise to a clean row in S of T steps (Song et al. 2021; MATH §5).

η = 0 is deterministic given R_T; η = 1 with S = T is ancestral sampling.

Legend: N real tokens, H heads, K entries of a generated row. ᾱ is `alpha_bar`, `t` a time τ of 1..T, `s` the next τ'.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

from torch import Tensor


def diffuse(clean_NHK: Tensor, eps_NHK: Tensor, alpha_bar_N11: Tensor) -> Tensor:
    """R_t = √ᾱ_t R_0 + √(1 − ᾱ_t) ε"""
    signal_N11, spread_N11 = (share.sqrt().to(clean_NHK.dtype) for share in (alpha_bar_N11, 1 - alpha_bar_N11))
    return signal_N11 * clean_NHK + spread_N11 * eps_NHK


def times(num_steps: int, sampling_steps: int) -> list[int]:
    """S of the times 1..T, evenly spaced, falling, the first one T."""
    return [-(-num_steps * step // sampling_steps) for step in range(sampling_steps, 0, -1)]


def step_sigma(alpha_bar_t: float, alpha_bar_s: float, eta: float) -> float:
    """σ = η √((1 − ᾱ_τ')/(1 − ᾱ_τ)) √(1 − ᾱ_τ/ᾱ_τ'); for η = 1 its square is the variance of q(R_τ' | R_τ, R_0)."""
    return eta * math.sqrt((1 - alpha_bar_s) / (1 - alpha_bar_t) * (1 - alpha_bar_t / alpha_bar_s))


def step(r_NHK: Tensor, clean_NHK: Tensor, alpha_bar_t: float, alpha_bar_s: float, sigma: float) -> Tensor:
    """The mean of R_τ' given R_τ and R̂_0: √ᾱ_τ' R̂_0 + √(1 − ᾱ_τ' − σ²) ε̂, with ε̂ = (R_τ − √ᾱ_τ R̂_0)/√(1 − ᾱ_τ)."""
    eps_NHK = (r_NHK - math.sqrt(alpha_bar_t) * clean_NHK) / math.sqrt(1 - alpha_bar_t)
    return math.sqrt(alpha_bar_s) * clean_NHK + math.sqrt(max(1 - alpha_bar_s - sigma**2, 0.0)) * eps_NHK


def sample(
    denoise: Callable[[Tensor, int], Tensor],
    noise: Callable[[int], Tensor],
    alpha_bar: Sequence[float],
    steps: Sequence[int],
    eta: float,
) -> Tensor:
    """R_0 from R_T ~ N(0, I): [N, H, K].

    denoise(R_τ, τ) gives R̂_0; noise(τ) the standard normals that make the state at time τ (0 at entries that do not
    exist, so that those stay exactly 0); steps are falling times that start at T. The last step returns R̂_0.
    """
    r_NHK = noise(steps[0])
    for t, s in pairwise(steps):
        sigma = step_sigma(alpha_bar[t], alpha_bar[s], eta)
        r_NHK = step(r_NHK, denoise(r_NHK, t), alpha_bar[t], alpha_bar[s], sigma)
        if eta > 0:
            r_NHK = r_NHK + sigma * noise(s)
    return denoise(r_NHK, steps[-1])
