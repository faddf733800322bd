"""Diffusion noise schedules: the cumulative signal share ᾱ_t for t = 0..T, in plain Python so that a config is checked
without torch.

Both are functions of u = t/T, so they are valid for every T ≥ 1 (MATH §5). Symbols: ᾱ_t `alpha_bar[t]`,
β_t = 1 − ᾱ_t/ᾱ_{t−1}, SNR_t = ᾱ_t/(1 − ᾱ_t).
"""

from __future__ import annotations

import itertools
import math

# ᾱ(1) of both schedules: exp(−0.1 − 9.95). Less would make few-step sampling divide by a vanishing signal; more would
# leave signal at t = T, and sampling from N(0, I) would start off-distribution.
ALPHA_BAR_FLOOR = math.exp(-10.05)


def alpha_bar(kind: str, num_steps: int) -> list[float]:
    """ᾱ_0..ᾱ_T (T + 1 values, ᾱ_0 = 1) of schedule `linear` or `cosine`.

    linear: ᾱ(u) = exp(−0.1u − 9.95u²), the continuous form of DDPM's linear β (Ho et al. 2020) for any T.
    cosine: ᾱ(u) = floor + (1 − floor)·f(u), f the squared cosine of Nichol & Dhariwal 2021 (offset 0.008), which by
    itself ends at 0.
    """
    return [_VALUE[kind](step / num_steps) for step in range(num_steps + 1)]


def check(kind: str, num_steps: int) -> None:
    """Raise ValueError unless 0 < ᾱ_T < 1e-3 and 0 < β_t < 1 for every t."""
    values = alpha_bar(kind, num_steps)
    betas = [1 - after / before for before, after in itertools.pairwise(values)]
    if not 0 < values[-1] < 1e-3:
        raise ValueError(
            f"schedule={kind} with diffusion_steps={num_steps} ends at alpha_bar={values[-1]:.2e}, not in (0, 1e-3)"
        )
    if not all(0 < beta < 1 for beta in betas):
        raise ValueError(f"schedule={kind} with diffusion_steps={num_steps} has a beta outside (0, 1)")


def _linear(u: float) -> float:
    return math.exp(-0.1 * u - 9.95 * u * u)


def _cosine(u: float, offset: float = 0.008) -> float:
    def f(v: float) -> float:
        return math.cos((v + offset) / (1 + offset) * math.pi / 2) ** 2

    return ALPHA_BAR_FLOOR + (1 - ALPHA_BAR_FLOOR) * f(u) / f(0)


_VALUE = {"linear": _linear, "cosine": _cosine}
