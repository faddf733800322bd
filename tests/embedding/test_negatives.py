"""Negatives follow the law that their correction assumes, and are a function of seed and step alone."""

import math

import pytest
import torch

from genatt_dist.embedding.negatives import Proposal, shared_key, uniform_ids

V = 40
CPU = torch.device("cpu")
POPULARITY = torch.arange(V, 0, -1) ** 2 // 40  # the rarest were never seen in training
KINDS = ("uniform", "log_uniform", "popularity")
every_kind = pytest.mark.parametrize("kind", KINDS)


def proposal(kind: str) -> Proposal:
    return Proposal(kind, V, POPULARITY, CPU)


def shared(one: Proposal, seed: int, step: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The draws that the batch of a step shares."""
    ids, log_expected = one.draw(shared_key(seed, step, CPU), count)
    return ids[0], log_expected[0]


def law(kind: str) -> torch.Tensor:
    """The weights as the documentation has them."""
    ids = torch.arange(1, V + 1, dtype=torch.float64)
    weight = {"uniform": ids * 0 + 1, "log_uniform": ((ids + 1) / ids).log(), "popularity": POPULARITY.double() + 1}[
        kind
    ]
    return weight / weight.sum()


def chi_square_is_small(counts: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether the statistic is within four standard deviations of its mean (one in ten thousand seeds is not)."""
    statistic = ((counts - expected) ** 2 / expected).sum().item()
    freedom = len(counts) - 1
    return abs(statistic - freedom) < 4 * math.sqrt(2 * freedom)


@every_kind
def test_law_sums_to_one_and_reaches_every_item(kind: str) -> None:
    q = proposal(kind).log_q_V.double().exp()
    assert q.sum().item() == pytest.approx(1, abs=1e-6)
    assert q.min() > 0
    torch.testing.assert_close(q, law(kind), rtol=1e-6, atol=0)


@every_kind
def test_draws_follow_the_law(kind: str) -> None:
    draws = 40_000
    ids, log_expected = shared(proposal(kind), 11, 0, draws)
    assert chi_square_is_small(torch.bincount(ids, minlength=V + 1)[1:].double(), law(kind) * draws)
    torch.testing.assert_close(log_expected, (law(kind)[ids - 1] * draws).log().float())


@every_kind
def test_draws_are_keyed_by_seed_and_step(kind: str) -> None:
    one = proposal(kind)
    ids, log_expected = shared(one, 1, 5, 256)
    again, _ = shared(proposal(kind), 1, 5, 256)
    assert torch.equal(ids, again)
    assert ids.shape == log_expected.shape == (256,)
    assert int(ids.min()) >= 1
    assert int(ids.max()) <= V
    for seed, step in ((1, 6), (2, 5)):
        assert (shared(one, seed, step, 256)[0] != ids).float().mean() > 0.5


def test_steps_draw_independently() -> None:
    """The pairs of draws of neighbouring steps fill the square evenly."""
    pairs = torch.zeros(8, 8, dtype=torch.float64)
    one = Proposal("uniform", 8, torch.zeros(8), torch.device("cpu"))
    for step in range(100):
        before, after = (shared(one, 3, step + shift, 64)[0] - 1 for shift in (0, 1))
        pairs.view(-1).index_add_(0, before * 8 + after, torch.ones(64, dtype=torch.float64))
    assert chi_square_is_small(pairs.flatten(), torch.full((64,), 100.0))


def test_own_negatives_of_a_token_are_uniform_over_items() -> None:
    keys = torch.arange(40_000) * 977 - 13
    ids = uniform_ids(keys, 1, V)
    assert torch.equal(ids, uniform_ids(keys, 1, V))
    assert torch.equal(ids[7:9], uniform_ids(keys[7:9], 1, V))
    assert torch.equal(ids, uniform_ids(keys, 3, V)[:, :1])
    assert chi_square_is_small(torch.bincount(ids[:, 0], minlength=V + 1)[1:].double(), torch.full((V,), 1000.0))


@every_kind
def test_own_draws_of_a_token_are_those_of_its_key_alone(kind: str) -> None:
    keys = torch.arange(100) * 31 + 7
    ids, log_expected = proposal(kind).draw(keys, 8)
    for token in (0, 57):
        alone_ids, alone_expected = proposal(kind).draw(keys[token : token + 1], 8)
        assert torch.equal(ids[token], alone_ids[0])
        assert torch.equal(log_expected[token], alone_expected[0])


def test_targets_of_a_batch_stand_once_with_their_number() -> None:
    """exp(o − lowered) summed over them is the sum over all G targets, whatever their order."""
    one, targets = proposal("in_batch"), torch.tensor([7, 3, 7, 7, 12, 3])
    ids, lowered = one.of_targets(targets, logq=True)
    assert ids.tolist() == [3, 7, 12]
    q = POPULARITY.double().clamp(min=1) / POPULARITY.double().clamp(min=1).sum()
    logits = torch.randn(V + 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = (logits[targets].exp() / (len(targets) * q[targets - 1])).sum()
    torch.testing.assert_close((logits[ids] - lowered).exp().sum(), expected, rtol=1e-6, atol=0)
    again, lowered_again = one.of_targets(targets.flip(0), logq=True)
    assert torch.equal(ids, again)
    assert torch.equal(lowered, lowered_again)
    uncorrected = one.of_targets(targets, logq=False)[1]
    torch.testing.assert_close((logits[ids] - uncorrected).exp().sum(), logits[targets].exp().sum())
