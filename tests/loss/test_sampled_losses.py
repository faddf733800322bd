"""Sampled softmax is the full one when everything is sampled, and estimates its denominator without bias otherwise; the
binary losses are their formulas.
"""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import genatt_dist.loss.sampled as sampled
from genatt_dist.embedding.negatives import Proposal, shared_key
from genatt_dist.loss.full import full_nll
from genatt_dist.loss.sampled import binary_nll, gbce_beta, own_scores, sampled_nll

N, V, D = 6, 30, 8


def rows(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """States, the rows of items 1..V, and target ids."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(1, V + 1, (N,), generator=generator)
    return torch.randn(N, D, generator=generator), torch.randn(V, D, generator=generator), targets


def shared_nll(states, items, targets, negatives, log_expected):
    """Of negatives that all targets share."""
    scores = states @ items.T
    hit = targets[:, None] == negatives
    return sampled_nll(scores.gather(1, targets[:, None] - 1).squeeze(1), scores[:, negatives - 1], hit, log_expected)


@pytest.mark.parametrize("times", [1, 3])
def test_every_item_gives_the_full_softmax(times: int) -> None:
    """Once and uncorrected, or each as often as it is expected and corrected by that."""
    states, items, targets = rows()
    everything = torch.randperm(V, generator=torch.Generator().manual_seed(1)).repeat(times) + 1
    nll = shared_nll(states, items, targets, everything, torch.full((times * V,), float(times)).log())
    torch.testing.assert_close(nll, full_nll(states, items, targets - 1, 4), rtol=0, atol=1e-6)


def test_draws_of_the_target_are_masked() -> None:
    """They are counted already; with nothing else drawn the loss and its gradients are zero, not NaN."""
    states, items, _ = rows()
    states.requires_grad_()
    negatives = torch.tensor([5, 7])
    target = torch.tensor([5])
    with_hit = shared_nll(states[:1], items, target, negatives, torch.zeros(2))
    without = shared_nll(states[:1], items, target, negatives[1:], torch.zeros(1))
    torch.testing.assert_close(with_hit, without)

    only_hits = shared_nll(states[:1], items, target, torch.tensor([5, 5]), torch.zeros(2))
    assert only_hits.item() == 0.0
    assert torch.equal(torch.autograd.grad(only_hits.sum(), states)[0], torch.zeros_like(states))


@pytest.mark.parametrize("kind", ["uniform", "log_uniform", "popularity"])
@pytest.mark.parametrize("count", [8, 64])
def test_sampled_denominator_is_unbiased(kind: str, count: int) -> None:
    """The mean over draws of Σ exp(o − log Kq) is Σ exp(o), within four standard errors of the sample's own."""
    states, items, _ = rows(2)
    logits_V = items @ states[0]
    popularity = torch.arange(V).flip(0) ** 2
    proposal = Proposal(kind, V, popularity, torch.device("cpu"))
    estimates = []
    for step in range(1500):
        (ids,), (log_expected,) = proposal.draw(shared_key(7, step, torch.device("cpu")), count)
        estimates.append((logits_V[ids - 1] - log_expected).exp().sum().item())
    sample = torch.tensor(estimates, dtype=torch.float64)
    standard_error = sample.std() / len(sample) ** 0.5
    truth = logits_V.double().exp().sum()
    assert abs(sample.mean() - truth) < 4 * standard_error
    # The bound means something: in K draws of the same variance each, the error falls as 1/√K.
    assert standard_error < truth * (0.2 if count == 8 else 0.08)


def test_the_targets_of_other_sequences_estimate_the_denominator_without_bias() -> None:
    """In-batch negatives: items drawn by the law of the targets, corrected by it."""
    states, items, _ = rows(2)
    logits_V = items @ states[0]
    popularity = torch.arange(V).flip(0) ** 2 + 1
    proposal = Proposal("in_batch", V, popularity, torch.device("cpu"))
    draw = torch.Generator().manual_seed(11)
    estimates = []
    for _ in range(1500):
        targets = torch.multinomial(popularity.float(), 64, replacement=True, generator=draw) + 1
        ids, lowered = proposal.of_targets(targets, logq=True)
        estimates.append((logits_V[ids - 1] - lowered).exp().sum().item())
    sample = np.array(estimates)
    standard_error = sample.std() / len(sample) ** 0.5
    assert abs(sample.mean() - logits_V.double().exp().sum().item()) < 4 * standard_error
    assert standard_error < 0.2 * sample.mean()


def test_binary_loss_is_the_direct_formula() -> None:
    states, items, targets = rows()
    negatives = targets.roll(1).clone()
    negatives[0] = targets[0]  # an accident: it counts nothing
    hit = targets == negatives
    right, wrong = (states * items[targets - 1]).sum(1), (states * items[negatives - 1]).sum(1)
    nll = binary_nll(right, wrong[:, None], hit[:, None], gbce_beta(1, V, 0.0))
    expected = F.binary_cross_entropy_with_logits(right, torch.ones(N), reduction="none")
    expected += F.binary_cross_entropy_with_logits(wrong, torch.zeros(N), reduction="none") * ~hit
    torch.testing.assert_close(nll, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("t", "beta"), [(0.0, 1.0), (1.0, 7 / (V - 1)), (0.75, 0.25 + 0.75 * 7 / (V - 1))])
def test_gbce_raises_the_targets_probability_to_beta(t: float, beta: float) -> None:
    assert gbce_beta(7, V, t) == pytest.approx(beta)
    target, negatives = torch.randn(N), torch.randn(N, 7)
    nll = binary_nll(target, negatives, torch.zeros(N, 7, dtype=torch.bool), beta)
    expected = -(torch.sigmoid(target) ** beta).log() - (1 - torch.sigmoid(negatives)).log().sum(1)
    torch.testing.assert_close(nll, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bytes_", [1, 700, 1 << 20])
def test_scores_of_own_negatives_are_those_of_gathered_rows(bytes_: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sampled.ROWS_BYTES, "cpu", bytes_)
    states, items, _ = rows()
    states.requires_grad_(), items.requires_grad_()
    index = torch.randint(0, V, (N, 5), generator=torch.Generator().manual_seed(2))
    weight = torch.randn(N, 5)
    expected = torch.einsum("nd,nkd->nk", states, items[index])
    wanted = torch.autograd.grad((weight * expected).sum(), (states, items))
    scores = own_scores(states, items, index)
    found = torch.autograd.grad((weight * scores).sum(), (states, items))
    torch.testing.assert_close(scores, expected)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
