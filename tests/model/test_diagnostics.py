"""The numbers behind the trainer's warnings: known values on known maps, and parts that add up."""

import pytest
import torch
from model_cases import ATTENTIONS, LENGTHS, backbone, context, rows

from genatt_dist.model.diagnostics import statistics


def means(result):
    return {key: total / count for key, (total, count) in result.items()}


@pytest.mark.parametrize("name", ATTENTIONS)
def test_statistics_are_finite_and_leave_the_model_as_it_was(name):
    model = backbone(name, heads=2).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    values = means(statistics(model, torch.cat(rows()), context()))
    assert model.training
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert all(torch.isfinite(value).all() for value in values.values())
    assert 0 < values["attention_entropy/block1"] <= 1
    assert ("residual_scale/block0" in values) == name.startswith("diffusion")
    if name != "dot_product":
        assert values["total_variation/block0"] > 0
        assert values["kl_mean/block0"].shape == (6,)
        assert values["active_units/block0"] == (values["kl_mean/block0"] > 0.01).sum()


def test_a_map_without_content_has_entropy_one():
    model = backbone("dot_product", blocks=1)
    torch.nn.init.zeros_(model.blocks[0].attention.w_q.weight)
    torch.nn.init.zeros_(model.blocks[0].attention.w_q.bias)
    total, count = statistics(model, torch.cat(rows()), context())["attention_entropy/block0"]
    assert count == sum(length - 1 for length in LENGTHS)
    torch.testing.assert_close(total / count, torch.tensor(1.0))


def test_total_variation_is_zero_without_variance():
    model = backbone("variational-factor", blocks=1)
    latent = model.blocks[0].attention.latent.w_sigma
    torch.nn.init.zeros_(latent.weight)
    torch.nn.init.constant_(latent.bias, -8.0)
    torch.nn.init.zeros_(model.blocks[0].attention.decoder.hidden.weight)
    assert means(statistics(model, torch.cat(rows()), context()))["total_variation/block0"] == 0


def test_sums_of_two_parts_are_the_whole_batchs():
    model, xs = backbone("variational-matrix"), rows()
    whole = statistics(model, torch.cat(xs), context())
    first = statistics(model, torch.cat(xs[:2]), context(LENGTHS[:2], (0, 1)))
    second = statistics(model, torch.cat(xs[2:]), context(LENGTHS[2:], (2, 3)))
    for name in ("attention_entropy/block1", "total_variation/block1", "kl_mean/block1"):
        for got, expected in zip(
            (a + b for a, b in zip(first[name], second[name], strict=True)), whole[name], strict=True
        ):
            torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
