"""Keyed noise has the laws it claims, is a function of its key alone, and is the function it has always been.

Keys are fixed, so a test that passes once always passes. `bound` gives the limit of a standard score that true random
numbers would break once in 1,000 tests, however many scores a test looks at.
"""

import itertools

import pytest
import torch

from genatt_dist.attention import noise
from genatt_dist.attention.noise import NoiseKey, Purpose, bits, derive, integers, keep_mask, normal, uniform

KEYS = derive(3, torch.arange(4000))


def bound(count):
    """The largest of `count` standard scores is above it with probability 1e-3 at most (Bonferroni, two-sided)."""
    return -float(torch.special.ndtri(torch.tensor(0.5e-3 / count, dtype=torch.float64)))


def scores(mean, expected, variance, count):
    """Standard scores of means of `count` independent numbers."""
    return (mean - expected).double().abs() / (variance / count) ** 0.5


def assert_within(score):
    assert score.max() < bound(score.numel())


def correlation(left, right):
    """Standard scores of the correlations of columns, √n times each: [n, p], [n, q] → [p, q]"""
    left, right = ((x.double() - x.double().mean(0)) / x.double().std(0) for x in (left, right))
    return (left.T @ right / len(left) ** 0.5).abs()


def ks(sample, cdf):
    """Kolmogorov's distance between a sample and a law, times √n: above 1.95 with probability 1e-3."""
    u = cdf(sample.double().flatten().sort().values)
    n = u.numel()
    grid = torch.arange(n + 1, dtype=torch.float64) / n
    return max((grid[1:] - u).max(), (u - grid[:-1]).max()) * n**0.5


def chi_square(counts):
    """Standard score of χ² of counts that should be equal, by Wilson and Hilferty's cube root."""
    expected, freedom = counts.double().mean(), counts.numel() - 1
    ratio = (((counts - expected) ** 2).sum() / expected / freedom) ** (1 / 3)
    return (ratio - (1 - 2 / (9 * freedom))) / (2 / (9 * freedom)) ** 0.5


def unpack(word):
    """The 64 bits of each int64: [...] → [..., 64] of 0. and 1."""
    return ((word.unsqueeze(-1) >> torch.arange(64)) & 1).float()


# What a key gives.


def splitmix(word):
    """SplitMix64's finaliser in exact arithmetic."""
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) % 2**64
    return word ^ (word >> 31)


def test_keys_and_words_are_splitmix():
    golden, other = 0x9E3779B97F4A7C15, 0x94D049BB133111EB
    for key, word in itertools.product((0, 1, 2**62, -1, -(2**63)), (0, 7, 2**63 - 1, -5)):
        folded = splitmix((key * golden + word * other + golden) % 2**64)
        assert derive(torch.tensor([key]), word).item() % 2**64 == folded
        assert derive(key, torch.tensor([word])).item() % 2**64 == folded
        assert derive(key, word) % 2**64 == folded
        words = [splitmix(splitmix((key + count * golden) % 2**64)) for count in (1, 2, 3)]
        assert [int(drawn) % 2**64 for drawn in bits(torch.tensor([key]), 3)[0]] == words


GOLDEN = {
    "key": [2638885834384750751],
    "bits": [[-3707490911981427045, 3852005329192999704]],
    "integers": [[142, 926, 757, 16]],
    "keep": [[0, 0, 1, 0, 0, 1, 1, 1, 1, 0, 0, 1]],
    "uniform": [[0.799016535282135, 0.20881766080856323, 0.39002376794815063]],
    "normal": [[-0.14193005859851837, -0.6546778678894043, 1.5549800395965576]],
}


def test_stream_is_what_it_has_always_been():
    """Published results and the GPU kernels rest on these numbers: a change here is a change of every run."""
    key = NoiseKey.make(1, 2, torch.tensor([30]), torch.tensor([0]), torch.tensor([4])).token(Purpose.LATENT, 1, 0)
    assert key.tolist() == GOLDEN["key"]
    assert bits(key, 2).tolist() == GOLDEN["bits"]
    assert integers(key, 4, 1000).tolist() == GOLDEN["integers"]
    assert keep_mask(key, 12, 0.5).int().tolist() == GOLDEN["keep"]
    assert uniform(key, 3).tolist() == GOLDEN["uniform"]
    assert (normal(key, 3) - torch.tensor(GOLDEN["normal"])).abs().max() < 1e-6  # logarithm and cosine are the device's


def test_uniform_and_normal_follow_from_the_words():
    word = bits(KEYS[:50], 8)
    high, low = (((part & 0x7FFFFF).double() + 0.5) / 2**23 for part in (word >> 41, word))
    assert torch.equal(uniform(KEYS[:50], 8).double(), high)
    pair = torch.stack((torch.cos(2 * torch.pi * low), torch.sin(2 * torch.pi * low)), -1)
    expected = ((-2 * high.log()).sqrt().unsqueeze(-1) * pair).flatten(-2).float()
    # The angle below 2π is rounded to float32: 2π·2^-24 at most, twice, times a radius below √(−2 ln 2^-24) = 5.8.
    assert (normal(KEYS[:50], 16) - expected).abs().max() < 5e-6


def test_blocks_shapes_and_strides_change_nothing(monkeypatch):
    """However many words are hashed at a time, whatever the keys' shape; and no draw writes into its keys."""
    keys, before = KEYS[:60].view(20, 3), KEYS[:60].clone()
    draws = [
        lambda key: bits(key, 7),
        lambda key: uniform(key, 7),
        lambda key: normal(key, 7),
        lambda key: keep_mask(key, 7, 0.3),
        lambda key: integers(key, 7, 9),
        lambda key: derive(key, 5),
    ]
    whole = [draw(KEYS[:60]) for draw in draws]
    for size in (1 << 15, 16):
        monkeypatch.setattr(noise, "_BLOCK", size)
        for draw, expected in zip(draws, whole, strict=True):
            assert torch.equal(draw(keys).flatten(0, 1), expected)
            assert torch.equal(draw(keys.T).transpose(0, 1).flatten(0, 1), expected)
            assert draw(keys[:0]).numel() == 0
    assert torch.equal(KEYS[:60], before)


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


def test_integer_and_tensor_words_agree():
    assert derive(5, 7) == derive(5, torch.tensor(7)).item()
    assert derive(derive(5, torch.tensor(7)), 9).item() == derive(5, 7, 9)


# The hash.


@pytest.mark.parametrize("stream", ["one word of many keys", "many words of one key"])
def test_bits_are_fair_and_independent(stream):
    """Each of the 64 bits is 1 half of the time, and no two go together: neither of one word nor of neighbours."""
    word = bits(derive(8, torch.arange(1 << 15)), 1)[:, 0] if "keys" in stream else bits(KEYS[:1], 1 << 15)[0]
    bit = unpack(word)
    assert_within(scores(bit.mean(0), 0.5, 0.25, len(bit)))
    within = correlation(bit, bit)
    assert_within(within[~torch.eye(64, dtype=torch.bool)])
    assert_within(correlation(bit[1:], bit[:-1]))


@pytest.mark.parametrize("of", ["key", "word"])
def test_every_bit_of_a_key_or_word_turns_half_of_the_bits_drawn(of):
    """Strict avalanche: also keys that differ in one bit give numbers that have nothing in common."""
    draw = {"key": lambda key: bits(key, 1)[..., 0], "word": lambda word: derive(12345, word)}[of]
    small = torch.arange(4000)  # as positions, steps and windows are
    for flipped in range(64):
        bit = torch.tensor(1) << flipped
        lower = small[small & bit == 0]  # so that no pair comes twice
        turned = unpack(draw(lower) ^ draw(lower | bit))
        assert scores(turned.mean(0), 0.5, 0.25, len(lower)).max() < bound(64 * 64)


def test_no_two_of_a_million_keys_are_equal():
    """64 bits: a collision has probability 3e-8."""
    assert derive(derive(1, torch.arange(1000))[:, None], torch.arange(1000)).unique().numel() == 1_000_000


# The laws.


@pytest.mark.parametrize("of", ["all", "first of every key", "one key"])
def test_uniform_and_normal_have_their_laws(of):
    take = {
        "all": lambda draw: draw(KEYS, 25),
        "first of every key": lambda draw: draw(derive(9, torch.arange(100_000)), 1),
        "one key": lambda draw: draw(KEYS[:1], 100_000),
    }[of]
    assert ks(take(uniform), lambda x: x) < 1.95
    assert ks(take(normal), torch.special.ndtr) < 1.95


def test_moments_are_those_of_the_normal_law():
    x = normal(KEYS, 50).double()
    moments = torch.stack([(x**power).mean() for power in (1, 2, 3, 4)])
    assert_within(scores(moments, torch.tensor([0.0, 1, 0, 3]), torch.tensor([1.0, 2, 15, 96]), x.numel()))
    of_entry = x.mean(0), (x**2).mean(0)
    assert_within(scores(of_entry[0], torch.zeros(50), 1.0, len(x)))
    assert_within(scores(of_entry[1], torch.ones(50), 2.0, len(x)))


def test_uniform_excludes_both_ends():
    u = uniform(KEYS, 250)
    assert u.min() > 0
    assert u.max() < 1


def test_pairs_of_successive_numbers_fill_the_square():
    """Serial test on a grid of 32 × 32: entries of a key, and the same entry of successive keys."""
    u = uniform(KEYS, 26)
    for left, right in ((u[:, :-1:2], u[:, 1::2]), (u[:-1:2], u[1::2])):
        cell = ((left * 32).long() * 32 + (right * 32).long()).flatten()
        assert chi_square(torch.bincount(cell, minlength=1024)) < bound(1)


@pytest.mark.parametrize("drop", [0.001, 0.1, 0.5, 0.9])
def test_keep_mask_drops_its_share_in_every_lane(drop):
    mask = keep_mask(KEYS, 30, drop)
    assert mask.shape == (4000, 30)
    assert mask.dtype == torch.bool
    share = round(drop * 65536) / 65536
    assert_within(scores((~mask).double().mean(0), share, share * (1 - share), 4000))
    lanes = torch.cat([mask[:, first : first + 4] for first in range(0, 28, 4)])
    assert_within(scores((~lanes).double().mean(0), share, share * (1 - share), len(lanes)))


def test_lanes_of_a_mask_are_independent():
    """Four lanes share a word: all 16 patterns come equally often, as all pairs of lanes of different words do."""
    mask = keep_mask(KEYS, 64, 0.5)
    pattern = (mask.unflatten(-1, (16, 4)) * torch.tensor([1, 2, 4, 8])).sum(-1)
    assert chi_square(torch.bincount(pattern.flatten(), minlength=16)) < bound(1)
    between = correlation(mask, mask)
    assert_within(between[~torch.eye(64, dtype=torch.bool)])


def test_keep_mask_at_its_ends():
    """0 keeps all; the largest p below 1 keeps one entry of 65,536, and never wraps around to keep all."""
    assert keep_mask(KEYS, 32, 0.0).all()
    assert keep_mask(KEYS, 32, 1 - 1e-9).sum() < 20  # 2 expected


@pytest.mark.parametrize("high", [10, 1000])
def test_integers_are_uniform(high):
    drawn = integers(KEYS, 25, high)
    assert drawn.dtype == torch.int64
    counts = torch.bincount(drawn.flatten(), minlength=high)
    assert counts.numel() == high
    assert chi_square(counts) < bound(1)


# Independence between keys.

# Every word that a key is made of (MATH §7.7): two values that are otherwise easily confused.
WORDS = {
    "seed": (0, 1),
    "root": (Purpose.TRAINING, Purpose.REQUEST),
    "sample": (0, 1),
    "step": (0, 1),
    "window": (0, 1),
    "position": (0, 1),
    "purpose": (Purpose.LATENT, Purpose.DIFFUSION),
    "block": (0, 1),
    "diffusion_step": (1, 2),
    "head": (0, 1),
}


def key_of(seed=5, root=Purpose.TRAINING, sample=0, step=3, window=2, position=1, purpose=Purpose.SAMPLER, **where):
    """Keys of 2000 tokens that agree in nothing else: windows 10 apart, positions 0..9 of each."""
    windows = 1000 + 10 * torch.arange(200) + window
    row, offset = torch.arange(2000) // 10, 10 * (torch.arange(2000) % 10)
    token = NoiseKey.make(int(derive(int(derive(seed, int(root))), sample)), step, windows, row, offset + position)
    words = [where.get(name, 0) for name in ("block", "diffusion_step")]
    return derive(token.token(purpose, *words), where.get("head", 0))


@pytest.mark.parametrize("word", WORDS)
def test_keys_that_differ_in_one_word_draw_independently(word):
    left, right = (key_of(**{word: value}) for value in WORDS[word])
    assert torch.cat((left, right)).unique().numel() == 4000
    x, y = normal(left, 24), normal(right, 24)
    assert_within(correlation(x, y))
    assert_within(correlation(x**2, y**2))
    kept, also = (keep_mask(key, 64, 0.5) for key in (left, right))
    assert scores((kept == also).double().mean(), 0.5, 0.25, kept.numel()) < bound(1)


def test_numbers_of_a_key_and_of_neighbouring_keys_are_independent():
    x = normal(KEYS, 24)
    for power in (1, 2):  # the pair that Box and Muller make shares its radius: squares would tell
        of_key = correlation(x**power, x**power)
        assert_within(of_key[~torch.eye(24, dtype=torch.bool)])
        assert_within(correlation(x[1:] ** power, x[:-1] ** power))


def test_purposes_words_seeds_and_steps_give_different_keys():
    def make(seed, step):
        return NoiseKey.make(seed, step, torch.arange(3), torch.arange(3), torch.zeros(3, dtype=torch.long))

    keys = [make(seed, step).token(p, block) for seed in (0, 1) for step in (0, 1) for p in Purpose for block in (0, 1)]
    assert torch.cat(keys).unique().numel() == 3 * len(keys)


def test_words_of_different_meaning_are_not_exchanged():
    """(step 1, window 2) is not (step 2, window 1), nor block 1 of sample 2 block 2 of sample 1."""
    exchanged = [derive(4, *words) for words in itertools.permutations((1, 2, 3))]
    assert len(set(exchanged)) == 6


def test_purposes_with_roots_of_their_own_share_no_key():
    """Initial rows, negatives, shuffles, training and requests: no seed, step or row makes one meet another."""
    roots = [int(derive(seed, int(purpose))) for seed in range(50) for purpose in Purpose]
    below = [int(derive(root, word)) for root in roots for word in range(50)]
    assert len({*roots, *below}) == len(roots) + len(below)
