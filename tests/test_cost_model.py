"""The cost model finds the numbers that made its data, and counts what the plan counts."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.scaling import features
from benchmarks.scaling.extrapolate import MARK, RANKS, extrapolated
from benchmarks.scaling.grid import Spec
from benchmarks.scaling.model import Line, Measured, Model, nonnegative
from genatt_dist.plan.cost import Link
from genatt_dist.plan.hardware import hardware

SIZES = [2.0**power for power in range(10, 27, 4)]
ALPHAS, BETAS = st.floats(1e-6, 1e-2), st.floats(1e-11, 1e-8)
SMALL = {"max_len": 6, "width": 8, "items": 300}


@settings(deadline=None)
@given(ALPHAS, BETAS)
def test_alpha_and_beta_are_found_again(alpha: float, beta: float) -> None:
    line = Line.fit(SIZES, [alpha + beta * size for size in SIZES])
    assert (line.alpha, line.beta) == (pytest.approx(alpha, rel=1e-6), pytest.approx(beta, rel=1e-6))


@settings(deadline=None)
@given(ALPHAS, BETAS, st.integers(0, 2**32 - 1))
def test_noise_of_two_per_cent_moves_a_prediction_between_the_sizes_by_no_more_than_a_few(
    alpha: float, beta: float, seed: int
) -> None:
    noise = np.random.default_rng(seed).uniform(0.98, 1.02, len(SIZES))
    line = Line.fit(SIZES, [(alpha + beta * size) * factor for size, factor in zip(SIZES, noise, strict=True)])
    for size in (3e3, 1e5, 2e7):
        assert line(size) == pytest.approx(alpha + beta * size, rel=0.05)


@settings(deadline=None)
@given(st.lists(st.one_of(st.just(0.0), st.floats(1e-3, 10.0)), min_size=4, max_size=4), st.integers(0, 2**32 - 1))
def test_weights_that_are_not_negative_are_found_again(weights: list[float], seed: int) -> None:
    columns_NK = np.random.default_rng(seed).uniform(0.1, 1.0, (12, 4)) * [1.0, 1e3, 1e6, 1e9]
    true_K = np.array(weights) / [1.0, 1e3, 1e6, 1e9]
    if not true_K.any():
        return
    found_K = nonnegative(columns_NK, columns_NK @ true_K)
    assert (found_K >= 0).all()
    np.testing.assert_allclose(columns_NK @ found_K, columns_NK @ true_K, rtol=1e-6)


def test_a_weight_that_would_be_negative_is_zero_and_the_rest_is_the_best_without_it() -> None:
    columns_NK = np.array([[1.0, 1.0], [1.0, 2.0], [1.0, 3.0]])
    found_K = nonnegative(columns_NK, np.array([3.0, 2.0, 1.0]))
    assert found_K[1] == 0
    errors = [abs(found_K[0] / seconds - 1) for seconds in (3.0, 2.0, 1.0)]
    assert sum(error**2 for error in errors) < sum((2.0 / seconds - 1) ** 2 for seconds in (3.0, 2.0, 1.0))


def test_a_column_of_zeros_and_the_same_column_twice_do_no_harm() -> None:
    column_N = np.array([1.0, 2.0, 5.0])
    found_K = nonnegative(np.stack([column_N, np.zeros(3), column_N], 1), 3 * column_N)
    assert found_K[0] + found_K[2] == pytest.approx(3)


def test_a_model_fitted_to_its_own_times_predicts_another_row() -> None:
    specs = [Spec(**SMALL, batch=batch, attention=name) for batch in (4, 16) for name in ("dot_product", "diffusion")]
    true_K = np.array([1e-10, 2e-10, 5e-6, 3e-10, 1e-10, 1e-9])
    amounts = [features.work(spec).amounts for spec in specs]
    timed = [{"kind": kind, "bytes": size, "seconds": 1e-4 + 1e-9 * size} for kind in ("all_reduce",) for size in SIZES]
    model = Model.fit({1: amounts}, {1: [float(each @ true_K) for each in amounts]}, {2: timed})
    other = features.work(Spec(**SMALL, batch=10)).amounts
    assert model.computing(other, 1) == pytest.approx(float(other @ true_K), rel=0.02)
    assert model.links[2].all_reduce(1e6) == pytest.approx(1.1e-3)


# --- what a row computes and exchanges --------------------------------------------------------------------------------


def test_one_step_training_computes_the_same_at_every_t() -> None:
    """But for the table of steps, which has a row for each."""
    amounts = [features.work(Spec(**SMALL, attention="diffusion", steps=steps, batch=4)).amounts for steps in (1, 200)]
    np.testing.assert_allclose(*amounts, rtol=0.03)
    np.testing.assert_array_equal(*(each[[0, 2, 3]] for each in amounts))


def test_a_rank_under_weak_scaling_computes_what_one_rank_does_but_for_its_part_of_the_update() -> None:
    one, two = (features.work(Spec(**SMALL, ranks=ranks, batch=4 * ranks)).amounts for ranks in (1, 2))
    same = [name != "dense update bytes" for name in features.NAMES]
    np.testing.assert_array_equal(one[same], two[same])
    assert two[features.NAMES.index("dense update bytes")] == one[features.NAMES.index("dense update bytes")] / 2


@pytest.mark.parametrize("loss", ["sampled", "full"])
def test_ranks_exchange_ids_and_rows_of_sharded_tables_only(loss: str) -> None:
    link = Link(hardware("cpu"), 2, 2)
    of = {
        table: features.work(Spec(**SMALL, ranks=2, batch=8, table=table, loss=loss)).exchanged(link)
        for table in ("replicated", "sharded")
    }
    assert "rows over ranks" not in of["replicated"]
    assert {"ids over ranks", "rows over ranks"} <= set(of["sharded"])
    assert ("states over ranks" in of["sharded"]) == (loss == "full")
    assert of["replicated"]["gradients over ranks"] > of["sharded"]["gradients over ranks"]


def test_one_rank_exchanges_nothing() -> None:
    assert features.work(Spec(**SMALL)).exchanged(Link(hardware("cpu"), 1, 1)) == {}


def test_distinct_ids_are_counted_as_the_benchmark_draws_them() -> None:
    random, draws = np.random.default_rng(0), 400
    rank = np.exp(random.random((200, draws)) * np.log(1000)).astype(np.int64)
    counted = np.mean([len(np.unique(row)) for row in rank])
    assert features.distinct(1000, draws) == pytest.approx(counted, rel=0.01)


def test_timed_collectives_stand_in_for_the_plans_links() -> None:
    lines = {kind: Line(1e-4, 1e-9) for kind in ("all_reduce", "all_gather", "all_to_all")}
    work = features.work(Spec(**SMALL, ranks=2, batch=8, table="sharded"))
    spent = work.exchanged(Measured(2, lines))
    assert spent["ids over ranks"] == pytest.approx(1e-4 + 1e-9 * 8 * work.ids)
    assert spent["rows over ranks"] == pytest.approx(2 * (1e-4 + 1e-9 * work.ids * 8 * 4))


def test_the_extrapolation_says_everywhere_that_it_is_a_model() -> None:
    found = extrapolated(6, 8)
    assert found["mark"] == MARK
    assert "NVIDIA" in found["constants"]
    assert {row["ranks"] for row in found["rows"]} == set(RANKS)
    assert all(row["mark"] == MARK and 0 < row["weak_efficiency"] <= 1 for row in found["rows"])
    sharded = [row["tokens_per_second"] for row in found["rows"] if row["table"] == "sharded" and row["steps"] is None]
    assert sharded == sorted(sharded)
