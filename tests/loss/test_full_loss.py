"""The chunked full softmax is cross-entropy over the whole catalogue: in value and in both gradients."""

import pytest
import torch
from torch.nn import functional as F

from genatt_dist.loss.full import full_loss, full_nll

N, V, D = 7, 11, 5


def inputs(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(3)
    states = torch.randn(N, D, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    items = torch.randn(V, D, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    targets = torch.tensor([0, V - 1, 4, 4, 4, 2, 9])
    weights = torch.rand(N, generator=generator) + 0.1
    return states, items, targets, weights


def reference(states, items, targets, weights):
    return (weights * F.cross_entropy(states @ items.T, targets, reduction="none")).sum()


@pytest.mark.parametrize("chunk", [1, 3, N, N + 5])
@pytest.mark.parametrize("weighted", [True, False])
def test_chunked_loss_equals_cross_entropy(chunk: int, weighted: bool) -> None:
    states, items, targets, weights = inputs(torch.float32)
    weights = weights if weighted else torch.ones(N)
    expected = reference(states, items, targets, weights)
    wanted = torch.autograd.grad(3.0 * expected, (states, items))
    loss = full_loss(states, items, targets, weights, chunk)
    found = torch.autograd.grad(3.0 * loss, (states, items))  # 3: what comes from behind scales the gradient
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_extreme_logits_stay_finite() -> None:
    """Probabilities underflow at such margins; the loss is made of the logits and does not."""
    states, items = torch.tensor([[200.0]], requires_grad=True), torch.tensor([[-1.0], [1.0]], requires_grad=True)
    loss = full_loss(states, items, torch.tensor([0]), torch.ones(1), 8)
    loss.backward()
    assert loss.item() == pytest.approx(400.0)
    assert states.grad is not None
    assert states.grad.item() == pytest.approx(2.0)


@pytest.mark.parametrize("chunk", [1, 3, N, N + 5])
def test_without_gradients_the_loss_is_the_same(chunk: int) -> None:
    states, items, targets, weights = inputs(torch.float32)
    with torch.no_grad():
        alone = full_loss(states, items, targets, weights, chunk)
    torch.testing.assert_close(alone, full_loss(states, items, targets, weights, chunk).detach())
    assert not alone.requires_grad


def test_nll_of_each_target_is_cross_entropy() -> None:
    states, items, targets, _ = inputs(torch.float32)
    expected = F.cross_entropy(states @ items.T, targets, reduction="none")
    torch.testing.assert_close(full_nll(states, items, targets, 2), expected.detach(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("chunk", [2, N])
def test_bfloat16_stays_near_float32(chunk: int) -> None:
    """bf16 keeps 8 bits of each factor, so about two per cent of the gradients' norm; the loss itself is float32."""
    states, items, targets, weights = inputs(torch.float32)
    low_states, low_items = (x.detach().bfloat16().requires_grad_() for x in (states, items))
    loss = full_loss(low_states, low_items, targets, weights, chunk)
    found = torch.autograd.grad(loss, (low_states, low_items))
    expected = reference(states, items, targets, weights)
    wanted = torch.autograd.grad(expected, (states, items))
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=0.02, atol=0.0)
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == torch.bfloat16
        assert (one.float() - other).norm() < 0.03 * other.norm()
