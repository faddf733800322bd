"""MATH §7.5 on a trained D-GenAtt, its denoiser left to L_gen (ρ = 0): what it samples has its target's law."""

from itertools import pairwise

import pytest
import torch

from benchmarks.drawn_maps import places
from benchmarks.recovery import given, law_ratios
from genatt_dist.model.diagnostics import total_variation

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

STEPS = 50  # T

every_form = pytest.mark.parametrize("form", ["factor", pytest.param("matrix", marks=pytest.mark.exhaustive)])


@every_form
def test_ancestral_samples_vary_as_much_as_their_target(form, trained, held_out, record_property):
    """η = 1, S = T. Fewer steps lose variance, which is reported and not bound."""
    ratios = law_ratios(trained(f"diffusion-{form}-faithful"), held_out[:128], (4, 10, STEPS), draws=8)
    for steps, row in ratios.items():
        record_property(f"sampled_over_target_variation/S={steps}", row)
    assert all(0.8 < ratio < 1.3 for ratio in ratios[STEPS])


@every_form
def test_fewer_steps_come_nearer_to_all_steps_as_they_grow(form, trained, held_out):
    """|A_S − A_T| at η = 0 from one R_T: the steps discretise one path."""
    model = trained(f"diffusion-{form}-faithful")
    for place in places(model.backbone, *given(model, held_out[:64])):
        finest = place.maps(2, sampling_steps=STEPS, eta=0.0)
        distances = []
        for steps in (1, 2, 5, 10, 25):
            maps = place.maps(2, sampling_steps=steps, eta=0.0)
            pairs = zip(maps, finest, strict=True)
            distances.append(torch.stack([total_variation(a, b, place.context.layout).mean() for a, b in pairs]).mean())
        assert all(nearer < farther for farther, nearer in pairwise(distances)), distances
