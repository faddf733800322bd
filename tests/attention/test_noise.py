"""Keyed noise has the laws it claims, and is a function of its key alone."""

import pytest
import torch

from genatt_dist.attention.noise import NoiseKey, Purpose, derive, integers, keep_mask, normal, uniform

KEYS = derive(3, torch.arange(4000))


def ks(sample, cdf):
    """Kolmogorov's distance between a sample and a law, times √n: above 1.63 with probability 0.01."""
    u = cdf(sample.double().flatten().sort().values)
    n = u.numel()
    grid = torch.arange(n + 1, dtype=torch.float64) / n
    return max((grid[1:] - u).max(), (u - grid[:-1]).max()) * n**0.5


def test_uniform_and_normal_have_their_laws():
    assert ks(uniform(KEYS, 25), lambda x: x) < 1.63
    assert ks(normal(KEYS, 25), torch.special.ndtr) < 1.63
    x = normal(KEYS, 25).double()
    assert abs(x.mean()) < 0.01
    assert abs(x.var() - 1) < 0.02
    assert abs((x**4).mean() - 3) < 0.1
    u = uniform(KEYS, 25)
    assert u.min() > 0
    assert u.max() < 1


def test_numbers_of_a_key_and_of_neighbouring_keys_are_independent():
    x = normal(KEYS, 24)
    correlation = torch.corrcoef(torch.cat((x, x.roll(1, 0)), dim=1).T)
    assert (correlation - torch.eye(48)).abs().max() < 0.08


@pytest.mark.parametrize("drop", [0.1, 0.5])
def test_keep_mask_drops_its_share(drop):
    mask = keep_mask(KEYS, 30, drop)
    assert mask.shape == (4000, 30)
    assert abs(1 - mask.float().mean() - drop) < 0.005
    assert (1 - mask.float().mean(0) - drop).abs().max() < 0.03


def test_integers_are_uniform():
    counts = torch.bincount(integers(KEYS, 25, 10).flatten(), minlength=10)
    assert counts.numel() == 10
    assert (counts / 1e5 - 0.1).abs().max() < 0.004


def test_fewer_numbers_of_a_key_are_the_first_of_more():
    """So a wider batch changes no draw."""
    for draw in (uniform, normal):
        assert torch.equal(draw(KEYS, 7), draw(KEYS, 20)[:, :7])
    assert torch.equal(keep_mask(KEYS, 7, 0.5), keep_mask(KEYS, 20, 0.5)[:, :7])


def test_a_tokens_key_depends_on_its_window_and_position_alone():
    position = torch.tensor([0, 1, 2, 0, 1])
    both = NoiseKey.make(1, 2, torch.tensor([30, 40]), torch.tensor([0, 0, 0, 1, 1]), position)
    alone = NoiseKey.make(1, 2, torch.tensor([40]), torch.tensor([0, 0]), position[3:])
    assert torch.equal(both.token(Purpose.LATENT, 1)[3:], alone.token(Purpose.LATENT, 1))
    assert torch.equal(both.sequence(Purpose.MIXTURE, 0)[1:], alone.sequence(Purpose.MIXTURE, 0))


def test_purposes_words_seeds_and_steps_give_different_keys():
    def make(seed, step):
        return NoiseKey.make(seed, step, torch.arange(3), torch.arange(3), torch.zeros(3, dtype=torch.long))

    keys = [make(seed, step).token(p, block) for seed in (0, 1) for step in (0, 1) for p in Purpose for block in (0, 1)]
    assert torch.cat(keys).unique().numel() == 3 * len(keys)


def test_integer_and_tensor_words_agree():
    assert derive(5, 7) == derive(5, torch.tensor(7)).item()
    assert derive(derive(5, torch.tensor(7)), 9).item() == derive(5, 7, 9)


def test_purposes_with_roots_of_their_own_share_no_key():
    """Initial rows, negatives, shuffles, training and requests: no seed, step or row makes one meet another."""
    roots = [int(derive(seed, int(purpose))) for seed in range(50) for purpose in Purpose]
    below = [int(derive(root, word)) for root in roots for word in range(50)]
    assert len({*roots, *below}) == len(roots) + len(below)
