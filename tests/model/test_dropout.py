"""Dropout by key: the right share, the right scale, another mask at every site."""

import torch
from model_cases import context

from genatt_dist.attention.noise import Purpose
from genatt_dist.model.dropout import Dropout, Site, dropout


def test_dropout_keeps_the_mean_and_drops_its_share():
    key = context((8,) * 40).noise.token(Purpose.DROPOUT, 0, 0)
    x = dropout(torch.ones(320, 64), 0.3, key)
    assert abs((x == 0).float().mean() - 0.3) < 0.01
    torch.testing.assert_close(x[x > 0], torch.full_like(x[x > 0], 1 / 0.7))


def test_sites_blocks_and_steps_have_their_own_masks():
    x = torch.ones(17, 64)
    first, again = (Dropout(0.5, Site.ATTENTION, 0)(x, context()) for _ in range(2))
    assert torch.equal(first, again)
    others = [
        Dropout(0.5, Site.FEED_FORWARD, 0)(x, context()),
        Dropout(0.5, Site.ATTENTION, 1)(x, context()),
        Dropout(0.5, Site.ATTENTION, 0)(x, context(step=1)),
    ]
    for other in others:
        assert 0.4 < (first == other).float().mean() < 0.6


def test_dropout_is_the_identity_in_evaluation_and_at_zero():
    x = torch.randn(17, 64)
    assert Dropout(0.5, Site.ATTENTION).eval()(x, context()) is x
    assert Dropout(0.0, Site.ATTENTION)(x, context()) is x
