"""Rates and the weight of the generative loss are functions of the step alone."""

import itertools
import math

import pytest

from genatt_dist.config import TrainingConfig
from genatt_dist.training.schedule import gamma_factor, rate_factor

TOTAL = 200


def rates(total: int = TOTAL, **changes: object) -> list[float]:
    config = TrainingConfig.model_validate(changes)
    return [rate_factor(config, step, total) for step in range(total + 1)]


@pytest.mark.parametrize("decay", ["constant", "linear", "cosine"])
def test_rates_rise_linearly_to_the_peak_and_never_again(decay: str) -> None:
    values = rates(warmup=0.1, decay=decay, final_rate=0.25)
    assert values[:20] == pytest.approx([(step + 1) / 20 for step in range(20)])
    assert values[20] == 1.0
    assert all(after <= before for before, after in itertools.pairwise(values[19:]))
    assert values[TOTAL] == pytest.approx(1.0 if decay == "constant" else 0.25)
    assert min(values) > 0


def test_decays_follow_their_formulas() -> None:
    halfway = 110  # between the end of the warm-up, 20, and 200
    assert rates(warmup=0.1, decay="linear", final_rate=0.2)[halfway] == pytest.approx(0.6)
    assert rates(warmup=0.1, decay="cosine", final_rate=0.2)[halfway] == pytest.approx(0.6)
    assert rates(warmup=0.1, decay="cosine", final_rate=0.0)[65] == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))


@pytest.mark.parametrize("total", [1, 2, 3])
def test_the_shortest_runs_have_a_rate(total: int) -> None:
    for warmup in (0.0, 0.02, 0.5, 0.99):
        assert all(0 < rate <= 1 for rate in rates(total, warmup=warmup)[:total])


def test_without_warm_up_the_first_step_has_the_peak_rate() -> None:
    assert rates(warmup=0.0)[0] == 1.0


def test_gamma_rises_from_zero_to_one_over_its_warm_up() -> None:
    values = [gamma_factor(0.1, step, TOTAL) for step in range(TOTAL)]
    assert values[:21] == pytest.approx([step / 20 for step in range(21)])
    assert set(values[20:]) == {1.0}
    assert gamma_factor(0.0, 0, TOTAL) == 1.0
