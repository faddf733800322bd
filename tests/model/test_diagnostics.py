"""The numbers behind the trainer's warnings: known values on known maps, and parts that add up."""

import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from model_cases import ATTENTIONS, GENERATIVE, LENGTHS, MAX_LEN, RANDOM, WIDTH, Parts, backbone, context, rows

from genatt_dist.attention.decoder import Posterior
from genatt_dist.attention.schedule import ALPHA_BAR_FLOOR
from genatt_dist.model.diagnostics import between_users, relative_entropy, statistics, total_variation

VARIATION = {"total_variation", "between_users"}
LATENT = {"kl_mean", "active_units"}
SCALES = {"residual_scale", "alpha_bar_T"}


def means(result):
    return {key: total / count for key, (total, count) in result.items()}


def expected_names(name):
    """What MATH §8 asks of each attention."""
    if name == "gru":
        return set()
    names = {"attention_entropy"} | (VARIATION if name in RANDOM else set())
    if name in GENERATIVE or name.startswith("deterministic"):
        names |= {"kappa"}
    diffuses = type(getattr(ATTENTIONS[name], "generator", ATTENTIONS[name])).__name__ == "DiffusionAttention"
    names |= (LATENT if name in GENERATIVE else set()) | (SCALES if diffuses else set())
    return names | ({"alpha"} if name.startswith("hybrid") else set())


@pytest.mark.parametrize("name", ATTENTIONS)
def test_each_attention_has_its_statistics_and_stays_as_it_was(name):
    model = backbone(name, heads=2).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    values = means(statistics(model, torch.cat(rows()), context()))
    assert model.training
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert all(torch.isfinite(value).all() for value in values.values())
    assert values.keys() == {f"{statistic}/block{block}" for statistic in expected_names(name) for block in range(2)}
    if name == "gru":
        return
    assert 0 < values["attention_entropy/block1"] <= 1
    if name in RANDOM:
        assert 0 < values["total_variation/block0"] < 1
        assert 0 <= values["between_users/block1"] <= 1
    if name in GENERATIVE:
        assert values["kl_mean/block0"].shape == (6,)
        assert values["active_units/block0"] == (values["kl_mean/block0"] > 0.01).sum()
        assert values["kappa/block1"].shape == (2,)


@pytest.mark.parametrize("name", ["variational-factor", "hybrid-diffusion", "positional"])
def test_a_map_that_all_blocks_share_is_told_once(name):
    values = statistics(backbone(name, share_map=True), torch.cat(rows()), context())
    assert {key.partition("/")[2] for key in values} == {"block0"}


@pytest.mark.parametrize("name", ["dot_product", "diffusion-factor", "variational-factor"])
def test_histories_of_one_item_have_no_number_of_rows_with_a_choice(name):
    found = statistics(backbone(name), torch.randn(3, WIDTH), context((1, 1, 1)))
    assert all(torch.isfinite(value).all() for value in means(found).values())
    expected = expected_names(name) - {"attention_entropy"} - VARIATION
    assert {key.partition("/")[0] for key in found} == expected


def test_the_end_of_the_schedule_is_told():
    values = means(statistics(backbone("diffusion-unrolled"), torch.cat(rows()), context()))
    assert values["alpha_bar_T/block0"] == pytest.approx(ALPHA_BAR_FLOOR, rel=1e-5)


def test_a_map_without_content_has_entropy_one():
    model = backbone("dot_product", blocks=1)
    for parameter in model.blocks[0].attention.parameters():
        torch.nn.init.zeros_(parameter)
    total, count = statistics(model, torch.cat(rows()), context())["attention_entropy/block0"]
    assert count == sum(length - 1 for length in LENGTHS)
    torch.testing.assert_close(total / count, torch.tensor(1.0))


def test_entropy_and_variation_of_maps_worked_by_hand():
    """Two rows with a choice: ½, ½ against 1, 0, and a third row that is the same in both maps."""
    layout = context((3,)).layout
    a = torch.tensor([[1.0, 0, 0], [0.5, 0.5, 0], [0.25, 0.25, 0.5]])[None, None]
    b = torch.tensor([[1.0, 0, 0], [1.0, 0, 0], [0.25, 0.25, 0.5]])[None, None]
    torch.testing.assert_close(total_variation(a, b, layout), torch.tensor([[0.5], [0.0]]))
    entropy = 0.5 * math.log(2) + 0.5 * math.log(4)
    torch.testing.assert_close(relative_entropy(a, layout), torch.tensor([[1.0], [entropy / math.log(3)]]))


def test_without_variance_the_variation_is_zero_and_all_of_it_between_users(monkeypatch):
    """A generator that became deterministic is told by its numbers; an attention that always was has none."""
    model = backbone("variational-factor", blocks=1)
    monkeypatch.setattr(Posterior, "sample", lambda posterior, eps_MZ: posterior.mu_MZ)
    values = means(statistics(model, torch.cat(rows()), context()))
    assert values["total_variation/block0"] == 0
    assert values["between_users/block0"] == 1


@pytest.mark.parametrize("share", [0.0, 0.3, 0.8])
def test_share_between_users_of_a_known_law(share):
    """a = u + e with Var u = share, Var e = 1 − share, at every place by itself.

    ICC(1) of two samples from n users has standard error (1 − ρ)(1 + ρ)/√(n − 1) (Fisher); pooling can only narrow it.
    """
    users, length = 2000, 4
    generator = torch.Generator().manual_seed(0)
    u, e, f = (torch.randn(users, 1, length, length, generator=generator).tril() for _ in range(3))
    a, b = (math.sqrt(share) * u + math.sqrt(1 - share) * noise for noise in (e, f))
    found, count = between_users(a, b, context((length,) * users), MAX_LEN)
    assert count == 1
    assert float(found) == pytest.approx(share, abs=4 * (1 - share**2) / math.sqrt(users - 1))


def test_maps_that_know_no_user_are_pure_noise():
    """The matrix form decoded from prior noise alone: what varies, varies within a user."""
    users = 400
    model = backbone("variational-matrix", blocks=1, decoder_input="latent")
    for parameter in model.blocks[0].attention.latent.parameters():
        torch.nn.init.zeros_(parameter)
    values = means(statistics(model, torch.randn(4 * users, WIDTH), context((4,) * users)))
    assert values["total_variation/block0"] > 0
    assert values["between_users/block0"] <= 4 / math.sqrt(users - 1)
    assert values["kl_mean/block0"].abs().max() < 1e-6
    assert values["active_units/block0"] == 0


@pytest.mark.parametrize("name", ["variational-matrix", "hybrid-diffusion", "dot_product"])
def test_sums_of_two_parts_are_the_whole_batchs(name):
    """Parts of different widths; what needs global moments is the same number in every part."""
    model, xs = backbone(name, heads=2).eval(), rows()
    whole = statistics(model, torch.cat(xs), context())
    parts = Parts(2)
    cuts = ((slice(0, 2), (0, 1)), (slice(2, 4), (2, 3)))

    def part(number):
        here, windows = cuts[number]
        batch = context(LENGTHS[here], windows, num_tokens=sum(LENGTHS), total=parts.total(number))
        return statistics(model, torch.cat(xs[here]), batch)

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(part, range(2))
    assert first.keys() == second.keys() == whole.keys()
    for key, (total, count) in whole.items():
        found = (first[key][0] + second[key][0]) / (first[key][1] + second[key][1])
        torch.testing.assert_close(found, total / count, atol=1e-5, rtol=1e-5, msg=key)
