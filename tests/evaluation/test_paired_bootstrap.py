"""The paired bootstrap against what is known of means, Holm against a hand, and what must not be compared."""

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import polars as pl
import pytest
from tiny_data import run_config

from data_pipeline.errors import GenattError
from genatt_dist import config as configuration
from genatt_dist.evaluation.compare import compare_runs, print_comparison
from genatt_dist.evaluation.metrics import CUTOFFS, metrics
from genatt_dist.evaluation.statistics import Ranks, compare, holm, of_users

RESAMPLES = 10_000
NORMAL = NormalDist()
PROTOCOL = {"split": "leave-one-out", "ranking": "full", "exclude_seen": True, "k_core": "5", "order": "stable"}


def _ranks(users: int, seed: int = 0) -> tuple[Ranks, Ranks]:
    """Two models that mostly agree, the first a little better."""
    draw = np.random.default_rng(seed)
    reference = draw.geometric(0.03, users)
    moved = reference + draw.integers(-4, 4, users)
    return np.maximum(1, moved), reference


def test_means_are_those_of_the_evaluation() -> None:
    rank_U, _ = _ranks(500)
    expected = metrics(rank_U, np.zeros((len(CUTOFFS), 1), np.int64))
    for name in ("mrr", *(f"{metric}@{k}" for metric in ("ndcg", "recall") for k in CUTOFFS)):
        assert of_users(rank_U, name).mean() == pytest.approx(expected[name], rel=1e-12)


@pytest.mark.parametrize("metric", ["ndcg@10", "recall@20", "mrr"])
def test_large_samples_agree_with_the_normal_law(metric: str) -> None:
    """Over R resamples the standard error is known to 1/√(2R) of itself, a quantile q at z to √(q(1−q)/R)/φ(z) standard
    errors and a tail t to √(t(1−t)/R): four of each. Beside it, skewness/√U moves the law by (z² − 1)/6 of itself
    (Edgeworth), and a mean of whole hits lies on a lattice of 1/U.
    """
    users = 4000
    rank_U, reference_U = _ranks(users)
    difference_U = of_users(rank_U, metric) - of_users(reference_U, metric)
    error = difference_U.std() / math.sqrt(users)
    found = compare(rank_U, reference_U, metric, RESAMPLES)
    assert found.difference == pytest.approx(difference_U.mean(), rel=1e-12)
    assert found.value - found.reference == pytest.approx(found.difference, rel=1e-9)
    assert found.standard_error == pytest.approx(error, rel=4 / math.sqrt(2 * RESAMPLES))

    skewness = abs(((difference_U - difference_U.mean()) ** 3).mean()) / difference_U.std() ** 3 / math.sqrt(users)
    step = 1 / users / error if metric.startswith("recall") else 0.0

    def moved(z: float) -> float:
        return abs(z**2 - 1) / 6 * skewness + step

    z = NORMAL.inv_cdf(0.975)
    tolerance = 4 * math.sqrt(0.025 * 0.975 / RESAMPLES) / NORMAL.pdf(z) + moved(z)
    assert found.low == pytest.approx(found.difference - z * error, abs=tolerance * error)
    assert found.high == pytest.approx(found.difference + z * error, abs=tolerance * error)
    at_zero = abs(found.difference) / error
    tail = NORMAL.cdf(-at_zero)
    spread = 4 * math.sqrt(tail * (1 - tail) / RESAMPLES)
    assert found.p / 2 == pytest.approx(tail, abs=spread + NORMAL.pdf(at_zero) * moved(at_zero) + 1 / RESAMPLES)


def test_interval_covers_and_p_rejects_as_often_as_they_say() -> None:
    """Samples of 300 users from a population whose difference is known; then the same with the difference taken out.

    400 samples: a share of 0.05 is known to 0.011; three of these, and 0.01 for the percentile interval at this size.
    """
    population_U, reference_U = _ranks(20_000, seed=1)
    truth = float((of_users(population_U, "ndcg@10") - of_users(reference_U, "ndcg@10")).mean())
    draw, missed, rejected, samples = np.random.default_rng(2), 0, 0, 400
    for sample in range(samples):
        users = draw.integers(0, len(population_U), 300)
        found = compare(population_U[users], reference_U[users], "ndcg@10", 1000, seed=sample)
        missed += not found.low <= truth <= found.high
        # Swapped for a random half of the users, the two models have the same law.
        swap = draw.random(300) < 0.5
        one, other = np.where(
            swap, (reference_U[users], population_U[users]), (population_U[users], reference_U[users])
        )
        rejected += compare(one, other, "ndcg@10", 1000, seed=sample).p <= 0.05
    assert abs(missed / samples - 0.05) < 0.043
    assert abs(rejected / samples - 0.05) < 0.043


@pytest.mark.parametrize("metric", ["ndcg@10", "mrr"])
def test_a_model_does_not_differ_from_itself(metric: str) -> None:
    rank_U, _ = _ranks(200)
    found = compare(rank_U, rank_U, metric, 200)
    assert (found.difference, found.low, found.high, found.standard_error, found.p) == (0, 0, 0, 0, 1)


@pytest.mark.parametrize("metric", ["ndcg@10", "mrr"])
def test_the_seed_decides_every_figure(metric: str) -> None:
    rank_U, reference_U = _ranks(300)
    assert compare(rank_U, reference_U, metric, 300, seed=1) == compare(rank_U, reference_U, metric, 300, seed=1)
    assert compare(rank_U, reference_U, metric, 300, seed=1) != compare(rank_U, reference_U, metric, 300, seed=2)


def test_clear_difference_has_the_smallest_p_there_is() -> None:
    better, worse = np.ones(50, np.int64), np.full(50, 30)
    found = compare(better, worse, "ndcg@10", 999)
    assert found.p == pytest.approx(2 / 1000)
    assert math.isnan(found.relative)  # of a reference of 0


@pytest.mark.parametrize(
    ("given", "adjusted"),
    [
        # .005 · 4 = .02, .01 · 3 = .03, .03 · 2 = .06, and .04 · 1 = .04 may not fall below the one before.
        ([0.01, 0.04, 0.03, 0.005], [0.03, 0.06, 0.06, 0.02]),
        ([0.6, 0.5], [1.0, 1.0]),
        ([0.02, 0.02], [0.04, 0.04]),
        ([0.3], [0.3]),
        ([], []),
    ],
)
def test_holm_by_hand(given: list[float], adjusted: list[float]) -> None:
    assert holm(given) == pytest.approx(adjusted)


@pytest.mark.parametrize("metric", ["auc", "ndcg", "recall@0", "coverage@10", "mrr@10"])
def test_metric_that_is_no_mean_over_users_is_refused(metric: str) -> None:
    with pytest.raises(GenattError, match=f"metric '{metric}' cannot be compared user by user: use ndcg@k"):
        of_users(np.ones(3, np.int64), metric)


class TestRuns:
    @pytest.fixture
    def run(self, tmp_path: Path) -> Callable[..., Path]:
        """An evaluated run of users 0, 1 … with these ranks."""

        def make(name: str, rank_U: Ranks, order: Any = None, **changes: Any) -> Path:
            path = tmp_path / name
            path.mkdir()
            (path / "config.yaml").write_text(configuration.dump(run_config("shards/x")))
            report = {
                "model": name,
                "users": len(rank_U),
                "dataset": {"name": "tiny", "manifest_hash": "0123456789abcdef"},
                "protocol": PROTOCOL,
            }
            (path / "evaluation-test.json").write_text(json.dumps(report | changes))
            (path / "summary.json").write_text("{}")
            frame = pl.DataFrame({"user_id": np.arange(len(rank_U)), "rank": rank_U})
            (frame if order is None else frame[order]).write_parquet(path / "ranks-test.parquet")
            return path

        return make

    def test_users_are_matched_by_id(self, run: Callable[..., Path]) -> None:
        rank_U, reference_U = _ranks(300)
        shuffled = np.random.default_rng(0).permutation(300)
        a, b, c = run("a", reference_U), run("b", rank_U), run("c", rank_U, shuffled)
        report = compare_runs([a, b, c, run("d", reference_U)], "test", "ndcg@10", 500)
        direct = compare(rank_U, reference_U, "ndcg@10", 500)
        one, other, same = report["comparisons"]
        for key in ("value", "difference", "low", "high", "p"):
            assert one[key] == other[key] == getattr(direct, key)
        assert (same["difference"], same["p"]) == (0, 1)
        assert [row["p_holm"] for row in report["comparisons"]] == holm([direct.p, direct.p, 1.0])
        assert report["reference"]["value"] == direct.reference

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            (
                {"dataset": {"name": "other", "manifest_hash": "f" * 64}},
                r"different data \(tiny 0123456789ab… and other f",
            ),
            ({"protocol": PROTOCOL | {"exclude_seen": False}}, "exclude_seen is True in one and False in the other"),
            ({"users": 4}, "ranks-test.parquet has 5 users, its evaluation 4"),
        ],
    )
    def test_other_data_or_protocol_is_refused(
        self, changes: dict[str, Any], message: str, run: Callable[..., Path]
    ) -> None:
        ranks = np.arange(1, 6)
        with pytest.raises(GenattError, match=message):
            compare_runs([run("a", ranks), run("b", ranks, **changes)], "test", "ndcg@10")

    def test_other_length_and_loss_may_be_compared(self, run: Callable[..., Path]) -> None:
        ranks = np.arange(1, 6)
        other = run("b", ranks, protocol=PROTOCOL | {"max_len": 200, "loss": "bce"})
        assert compare_runs([run("a", ranks), other], "test", "mrr", 100)["comparisons"][0]["p"] == 1

    def test_other_users_are_refused(self, run: Callable[..., Path]) -> None:
        a, b = run("a", np.arange(1, 6)), run("b", np.arange(1, 8))
        with pytest.raises(GenattError, match=r"2 users are in one of them alone \(5 and 7 users on test\)"):
            compare_runs([a, b], "test", "ndcg@10")

    def test_run_that_is_not_evaluated_is_told_the_command(self, run: Callable[..., Path]) -> None:
        a = run("a", np.arange(1, 6))
        with pytest.raises(GenattError, match=f"run `genatt evaluate {a} --split valid`"):
            compare_runs([a, run("b", np.arange(1, 6))], "valid", "ndcg@10")

    @pytest.mark.parametrize(
        "table", [{"user_id": [0, 1]}, {"rank": [1, 2]}, {"user_id": [0, 1], "rank": ["first", "second"]}, None]
    )
    def test_ranks_that_cannot_be_read_are_told_the_command(
        self, table: dict[str, Any] | None, run: Callable[..., Path]
    ) -> None:
        a, b = run("a", np.arange(1, 3)), run("b", np.arange(1, 3))
        if table is None:
            (b / "ranks-test.parquet").write_bytes(b"PAR1")
        else:
            pl.DataFrame(table).write_parquet(b / "ranks-test.parquet")
        with pytest.raises(GenattError, match=f"run `genatt evaluate {b} --split test`"):
            compare_runs([a, b], "test", "ndcg@10")

    def test_unfinished_run_is_told_the_command(self, run: Callable[..., Path]) -> None:
        a, b = run("a", np.arange(1, 6)), run("b", np.arange(1, 6))
        (b / "summary.json").unlink()
        with pytest.raises(GenattError, match=f"run `genatt train {b}/config.yaml --run {b} --resume`, then"):
            compare_runs([a, b], "test", "ndcg@10")

    def test_run_that_is_given_twice_is_refused(self, run: Callable[..., Path]) -> None:
        a, b = run("a", np.arange(1, 6)), run("b", np.arange(1, 6))
        with pytest.raises(GenattError, match=r"b/\.\./a is given twice: name each run once"):
            compare_runs([a, b, b / ".." / "a"], "test", "ndcg@10")

    def test_one_run_is_refused(self, run: Callable[..., Path]) -> None:
        with pytest.raises(GenattError, match="name at least two"):
            compare_runs([run("a", np.arange(1, 6))], "test", "ndcg@10")

    def test_table_has_the_numbers(self, run: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
        rank_U, reference_U = _ranks(300)
        report = compare_runs([run("a", reference_U), run("b", rank_U)], "test", "ndcg@10", 500)
        print_comparison(report)
        out = capsys.readouterr().out
        for value in (report["reference"]["value"], *(report["comparisons"][0][key] for key in ("value", "p_holm"))):
            assert f"{value:.4f}" in out
        assert f"{report['comparisons'][0]['low']:+.4f}, {report['comparisons'][0]['high']:+.4f}" in out

    def test_the_verb_prints_json_and_imports_no_torch(self, run: Callable[..., Path]) -> None:
        rank_U, reference_U = _ranks(50)
        code = (
            "import sys\n"
            "from genatt_dist.cli import main\n"
            "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code\n"
            "print('torch' in sys.modules, file=sys.stderr)"
        )
        paths = [str(run("a", reference_U)), str(run("b", rank_U))]
        done = subprocess.run(
            [sys.executable, "-c", code, "compare", *paths, "--json"],
            capture_output=True, text=True, timeout=60, check=True,
        )  # fmt: skip
        assert done.stderr == "False\n"
        assert json.loads(done.stdout) == compare_runs([Path(path) for path in paths], "test", "ndcg@10")
