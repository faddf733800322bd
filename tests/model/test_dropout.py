"""Dropout by key: the right share, the right scale, another mask at every site, and a byte an entry until backward."""

import pytest
import torch
from model_cases import context

from genatt_dist.attention.noise import Purpose, keep_mask
from genatt_dist.model.dropout import Dropout, Site, dropout

KEYS = context((8,) * 40).noise.token(Purpose.DROPOUT, 0, 0)


def test_dropout_keeps_the_mean_and_drops_its_share():
    x = dropout(torch.ones(320, 64), 0.3, KEYS)
    # Standard error of the share: √(0.3 · 0.7 / 20,480) = 0.0032.
    assert abs((x == 0).float().mean() - 0.3) < 3.3 * 0.0032
    torch.testing.assert_close(x[x > 0], torch.full_like(x[x > 0], 1 / 0.7))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.3, 0.5])
def test_dropout_and_its_gradient_are_those_of_the_formula(p, dtype):
    x, gradient = (torch.randn(320, 64).to(dtype) for _ in range(2))
    keep, before = keep_mask(KEYS, 64, p), x.clone()
    results = []
    for drop in (lambda x: dropout(x, p, KEYS), lambda x: x * keep / (1 - p)):
        leaf = x.detach().requires_grad_()
        y = drop(leaf)
        y.backward(gradient)
        results.append((y.detach(), leaf.grad))
    (y, slope), (expected_y, expected_slope) = results
    assert y.dtype == slope.dtype == dtype
    assert torch.equal(y, expected_y)
    assert torch.equal(slope, expected_slope)
    assert torch.equal(x, before)


def test_gradient_is_the_derivative():
    x = torch.randn(20, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: dropout(x, 0.4, KEYS[:20]), x)


def test_backward_keeps_one_byte_an_entry():
    kept = []
    x = torch.randn(320, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        dropout(x, 0.5, KEYS).sum().backward()
    assert sum(tensor.untyped_storage().nbytes() for tensor in kept) == x.numel()


def test_sites_blocks_and_steps_have_their_own_masks():
    x = torch.ones(17, 64)
    first, again = (Dropout(0.5, Site.ATTENTION, 0)(x, context()) for _ in range(2))
    assert torch.equal(first, again)
    others = [
        Dropout(0.5, Site.FEED_FORWARD, 0)(x, context()),
        Dropout(0.5, Site.ATTENTION, 1)(x, context()),
        Dropout(0.5, Site.ATTENTION, 0)(x, context(step=1)),
    ]
    for other in others:  # standard error of the share that agrees: √(¼ / 1088) = 0.015
        assert abs((first == other).float().mean() - 0.5) < 3.9 * 0.015


def test_dropout_is_the_identity_in_evaluation_and_at_zero():
    x = torch.randn(17, 64)
    assert Dropout(0.5, Site.ATTENTION).eval()(x, context()) is x
    assert Dropout(0.0, Site.ATTENTION)(x, context()) is x
