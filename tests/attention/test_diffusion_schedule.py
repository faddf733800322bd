"""Both schedules are valid for every T, and one that is not is refused before anything runs."""

import math
import re

import pytest

from genatt_dist.attention import schedule
from genatt_dist.config import DiffusionAttention


@pytest.mark.parametrize("kind", ["linear", "cosine"])
@pytest.mark.parametrize("num_steps", [1, 2, 5, 50, 200])
def test_schedules_are_valid_for_every_number_of_steps(kind, num_steps):
    schedule.check(kind, num_steps)
    values = schedule.alpha_bar(kind, num_steps)
    assert len(values) == num_steps + 1
    assert values[0] == 1
    assert values[-1] == pytest.approx(4.3e-5, rel=0.01)


def test_linear_is_the_closed_form():
    assert schedule.alpha_bar("linear", 50)[20] == pytest.approx(math.exp(-0.1 * 0.4 - 9.95 * 0.16))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1.0, 0.6], "ends at alpha_bar=6.00e-01"),
        ([1.0, 0.0], "ends at alpha_bar=0.00e+00"),
        ([1.0, 0.5, 0.5, 1e-4], "has a beta outside"),
    ],
)
def test_a_bad_schedule_is_refused(monkeypatch, values, message):
    monkeypatch.setitem(schedule._VALUE, "linear", lambda u: values[round(u * (len(values) - 1))])
    with pytest.raises(ValueError, match=re.escape(message)):
        DiffusionAttention(diffusion_steps=len(values) - 1, sampling_steps=1)
