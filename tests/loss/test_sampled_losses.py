"""Sampled softmax is the full one when everything is sampled, and estimates its denominator without bias otherwise."""

import pytest
import torch
from torch.nn import functional as F

from genatt_dist.embedding.negatives import Proposal, shared_key
from genatt_dist.loss.full import full_nll
from genatt_dist.loss.sampled import bce_nll, sampled_nll

N, V, D = 6, 30, 8


def rows(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """States, the rows of items 1..V, and target ids."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(1, V + 1, (N,), generator=generator)
    return torch.randn(N, D, generator=generator), torch.randn(V, D, generator=generator), targets


def test_every_item_once_gives_the_full_softmax() -> None:
    states, items, targets = rows()
    everything = torch.randperm(V, generator=torch.Generator().manual_seed(1)) + 1
    nll = sampled_nll(states, items[targets - 1], items[everything - 1], targets, everything, torch.zeros(V))
    torch.testing.assert_close(nll, full_nll(states, items, targets - 1, 4), rtol=0, atol=1e-6)


def test_draws_of_the_target_are_masked() -> None:
    """They are counted already; with nothing else drawn the loss and its gradients are zero, not NaN."""
    states, items, _ = rows()
    states.requires_grad_()
    negatives = torch.tensor([5, 7])
    target = torch.tensor([5])
    with_hit = sampled_nll(states[:1], items[4:5], items[[4, 6]], target, negatives, torch.zeros(2))
    without = sampled_nll(states[:1], items[4:5], items[[6]], target, negatives[1:], torch.zeros(1))
    torch.testing.assert_close(with_hit, without)

    only_hits = sampled_nll(
        states[:1], items[4:5], items[[4, 4]], target, torch.tensor([5, 5]), torch.zeros(2)
    )  # fmt: skip
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
        ids, log_expected = proposal.draw(shared_key(7, step), count)
        estimates.append((logits_V[ids - 1] - log_expected).exp().sum().item())
    sample = torch.tensor(estimates, dtype=torch.float64)
    standard_error = sample.std() / len(sample) ** 0.5
    truth = logits_V.double().exp().sum()
    assert abs(sample.mean() - truth) < 4 * standard_error
    # The bound means something: in K draws of the same variance each, the error falls as 1/√K.
    assert standard_error < truth * (0.2 if count == 8 else 0.08)


def test_binary_loss_is_the_direct_formula() -> None:
    states, items, targets = rows()
    negatives = targets.roll(1).clone()
    negatives[0] = targets[0]  # an accident: it counts nothing
    nll = bce_nll(states, items[targets - 1], items[negatives - 1], targets, negatives)
    right, wrong = (states * items[targets - 1]).sum(1), (states * items[negatives - 1]).sum(1)
    expected = -torch.sigmoid(right).log() - (1 - torch.sigmoid(wrong)).log() * (targets != negatives)
    torch.testing.assert_close(nll, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        nll[1:],
        F.binary_cross_entropy_with_logits(right, torch.ones(N), reduction="none")[1:]
        + (F.binary_cross_entropy_with_logits(wrong, torch.zeros(N), reduction="none") * (targets != negatives))[1:],
    )
