"""The exact predictor that recovery is measured against is exact, and sequences are drawn from its law."""

import itertools
import math
from functools import cache

import pytest
import torch

from benchmarks.copy_law import CopyLaw


def joint(items: tuple[int, ...], law: CopyLaw) -> float:
    """p(x_0 … x_m) from the story alone: an intent, and for each item whether it is a copy."""
    total = 0.0
    for k in law.intents:
        for copies in itertools.product((False, True), repeat=len(items)):
            p = 1 / len(law.intents)
            for m, is_copy in enumerate(copies):
                p *= law.copy if is_copy else 1 - law.copy
                if is_copy and m >= k:
                    p *= items[m] == items[m - k]
                else:
                    p /= law.num_items
            total += p
    return total


@pytest.mark.parametrize(("intents", "copy"), [((1, 3), 0.8), ((1, 2, 4), 0.55), ((2,), 0.3)])
def test_the_bayes_predictor_is_a_quotient_of_enumerated_probabilities(intents, copy):
    """Over all 3^5 sequences of five items."""
    law = CopyLaw(num_items=3, intents=intents, copy=copy)
    sequences = list(itertools.product(range(1, 4), repeat=5))
    probability = cache(lambda items: joint(items, law))
    expected = [
        [-math.log(probability(items[: m + 1]) / probability(items[:m])) for m in range(1, 5)] for items in sequences
    ]
    got = law.bayes_nll(torch.tensor(sequences))
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64), atol=1e-12, rtol=1e-12)
    assert math.fsum(map(probability, sequences)) == pytest.approx(1, abs=1e-12)


def test_sequences_have_the_probabilities_of_the_law():
    """χ² of all 2^5 sequences of two items; its 0.999 quantile at 31 degrees of freedom is 61.1."""
    law, count = CopyLaw(num_items=2, intents=(1, 3), copy=0.6), 100_000
    items_BM = law.draw(count, 5, seed=0)
    seen = torch.bincount(((items_BM - 1) * 2 ** torch.arange(5)).sum(1), minlength=32).double()
    every = [tuple(1 + (code >> m & 1) for m in range(5)) for code in range(32)]
    expected = count * torch.tensor([joint(items, law) for items in every], dtype=torch.float64)
    assert ((seen - expected) ** 2 / expected).sum() < 61.1


def test_draws_are_a_function_of_their_seed():
    law = CopyLaw()
    first, again, other = (law.draw(64, 17, seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.min() >= 1
    assert first.max() <= law.num_items
