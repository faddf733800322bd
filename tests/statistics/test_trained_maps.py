"""MATH §7.2–4 on a trained V-GenAtt: its maps are random, they are the user's own, and the latent decides them.

The decoder is given z alone. Where it is given S too (the default) it may pass z by, and on this law it does: noise in
z is only a cost, and the z of the prior serves as well. `benchmarks.recovery` reports both cases.
"""

import pytest
import torch

from benchmarks.drawn_maps import places, variation
from benchmarks.interventions import latent_of_the_prior, states_of_another_user
from benchmarks.recovery import POSITIONS, given, inferring, mean_and_error, nll
from genatt_dist.model.diagnostics import statistics

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

DRAWS = 64
SAMPLES = 16  # of a loss that is only compared with itself


@pytest.fixture(scope="module")
def model(trained):
    return trained("variational-latent")


@pytest.fixture(scope="module")
def drawn(model, held_out):
    """Of both blocks: where its maps come from, and DRAWS of them for the same X: [S, B, H, n, n]."""
    return [(place, place.maps(DRAWS)) for place in places(model.backbone, *given(model, held_out[:64]))]


def test_maps_of_the_same_tokens_differ(drawn):
    assert len(drawn) == 2
    assert all(variation(maps, place) > 0.02 for place, maps in drawn)


def test_the_mean_map_repeats_and_draws_nothing(model, held_out):
    mean = inferring(model, inference="mean").backbone
    with torch.no_grad():
        first, second = (mean(*given(model, held_out, sample)).states_ND for sample in (0, 1))
    assert torch.equal(first, second)


def test_part_of_a_maps_variance_lies_between_users_and_part_within(drawn):
    """Of rows i ≥ 1, pooled over places; both parts unbiased: a mean of S draws holds 1/S of the variance within."""
    for _, maps_SBHnn in drawn:
        rows = maps_SBHnn[..., 1:, :].double()
        within = rows.var(0).mean(0).sum()
        between = rows.mean(0).var(0).sum() - within / DRAWS
        assert 0.1 < between / (between + within) < 0.99


def test_another_users_states_cost_likelihood(model, held_out):
    own = nll(model, held_out, SAMPLES)
    with states_of_another_user(model.backbone, POSITIONS):
        increase, error = mean_and_error(nll(model, held_out, SAMPLES) - own)
    assert increase > 2 * error


def test_a_latent_that_knows_nothing_costs_likelihood(model, held_out):
    own = nll(model, held_out, SAMPLES)
    with latent_of_the_prior(model.backbone):
        increase, error = mean_and_error(nll(model, held_out, SAMPLES) - own)
    assert increase > 2 * error


def test_the_posterior_has_not_collapsed(model, held_out, record_property):
    """A collapsed dimension's KL is 0: of free bits λ = 0.05 each, without them all of them fall below 0.01."""
    observed = statistics(model.backbone, *given(model, held_out))
    for block in (0, 1):
        total, count = observed[f"kl_mean/block{block}"]
        record_property(f"kl_per_dimension/block{block}", (total / count).tolist())
        assert observed[f"active_units/block{block}"][0] >= len(total) / 2
