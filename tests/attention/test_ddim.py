"""The forward process and DDIM against their closed forms."""

import math
from itertools import pairwise

import pytest
import torch
from test_noise import ks

from genatt_dist.attention import sampler
from genatt_dist.attention.schedule import alpha_bar


def alpha_column(kind, steps, t):
    return torch.full((1, 1, 1), alpha_bar(kind, steps)[t])


@pytest.mark.parametrize("kind", ["linear", "cosine"])
@pytest.mark.parametrize("t", [1, 7, 20])
def test_forward_marginals_are_closed_form(kind, t):
    """t single steps q(R_t | R_{t−1}) = N(√(1−β) R_{t−1}, β) have the law of one `diffuse`: N(√ᾱ_t R_0, 1 − ᾱ_t)."""
    values, n, r0 = alpha_bar(kind, 20), 20_000, 1.7
    x = torch.full((n, 1, 1), r0)
    for before, after in pairwise(values[: t + 1]):
        beta = 1 - after / before
        x = math.sqrt(1 - beta) * x + math.sqrt(beta) * torch.randn_like(x)
    closed = sampler.diffuse(torch.full((n, 1, 1), r0), torch.randn(n, 1, 1), alpha_column(kind, 20, t))
    for sample in (x, closed):
        standard = (sample - math.sqrt(values[t]) * r0) / math.sqrt(1 - values[t])
        assert ks(standard, torch.special.ndtr) < 1.63


@pytest.mark.parametrize("kind", ["linear", "cosine"])
@pytest.mark.parametrize("t", [2, 10, 50])
def test_an_ancestral_step_is_the_posterior(kind, t):
    """η = 1, τ' = τ − 1: mean and variance of q(R_{t−1} | R_t, R_0) (Ho et al. 2020, equations 6 and 7)."""
    values = alpha_bar(kind, 50)
    a_t, a_s = values[t], values[t - 1]
    beta = 1 - a_t / a_s
    r_t, r_0 = torch.randn(2, 4, 1, 3, dtype=torch.float64)
    mean = (math.sqrt(a_s) * beta * r_0 + math.sqrt(1 - beta) * (1 - a_s) * r_t) / (1 - a_t)
    sigma = sampler.step_sigma(a_t, a_s, 1.0)
    assert sigma**2 == pytest.approx((1 - a_s) / (1 - a_t) * beta, rel=1e-9)
    torch.testing.assert_close(sampler.step(r_t, r_0, a_t, a_s, sigma), mean, atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize(("steps", "eta"), [(200, 1.0), (200, 0.0), (50, 0.5)])
def test_the_exact_denoiser_of_a_gaussian_gives_that_gaussian_back(steps, eta):
    """R_0 ~ N(0, v): E[R_0 | R_t] = √ᾱ_t v R_t/(ᾱ_t v + 1 − ᾱ_t). Few steps lose variance, never gain it."""
    values, v = alpha_bar("linear", 200), 0.5

    def denoise(r, t):
        return math.sqrt(values[t]) * v / (values[t] * v + 1 - values[t]) * r

    def noise(t):
        return torch.randn(20_000, 1, 1)

    x = sampler.sample(denoise, noise, values, sampler.times(200, steps), eta)
    assert abs(x.mean()) < 0.02
    assert 0.89 * v < x.var() < 1.02 * v


@pytest.mark.parametrize(
    ("num_steps", "sampling_steps", "expected"),
    [(50, 1, [50]), (50, 2, [50, 25]), (50, 4, [50, 38, 25, 13]), (5, 5, [5, 4, 3, 2, 1]), (1, 1, [1])],
)
def test_times_fall_evenly_from_the_last(num_steps, sampling_steps, expected):
    assert sampler.times(num_steps, sampling_steps) == expected


def test_one_step_is_the_conditional_mean():
    r_t = torch.randn(3, 1, 2)
    got = sampler.sample(lambda r, t: 2 * r + t, lambda t: r_t, alpha_bar("linear", 50), [50], eta=1.0)
    assert torch.equal(got, 2 * r_t + 50)


def test_eta_zero_draws_only_the_start():
    drawn = []
    sampler.sample(
        lambda r, t: r, lambda t: drawn.append(t) or torch.zeros(1), alpha_bar("linear", 8), sampler.times(8, 4), 0.0
    )
    assert drawn == [8]
