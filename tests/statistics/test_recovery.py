"""MATH §7.8: a generated map learns what only the history tells, as well as can be told from it."""

import pytest

from benchmarks.recovery import ATTENTIONS, LAW, SAMPLES, mean_and_error, nll

BOUND = 0.05  # nat above the exact floor
TESTED = ("diffusion-factor-faithful",)  # each takes minutes
OTHERS = [name for name, fields in ATTENTIONS.items() if "form" in fields or "diffusion" in name]


def gap_to_bayes(model, items_BM):
    return mean_and_error(nll(model, items_BM, SAMPLES) - LAW.bayes_nll(items_BM))


def check(model, items_BM):
    """Paired with the floor of the same sequences. Below it, beyond chance, lies only what has seen its target."""
    gap, error = gap_to_bayes(model, items_BM)
    assert -3 * error < gap < BOUND - 2 * error


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", TESTED)
def test_generated_attention_is_within_a_twentieth_of_a_nat_of_the_bayes_predictor(name, trained, held_out):
    check(trained(name), held_out)


@pytest.mark.exhaustive
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", [name for name in OTHERS if name not in TESTED])
def test_so_are_the_other_forms_and_ways_to_train(name, trained, held_out):
    check(trained(name), held_out)
