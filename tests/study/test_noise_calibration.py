"""Noise of the control is found by bisection, checked after training, and found again where training moved it."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_data import run_tree

from data_pipeline.errors import GenattError
from genatt_dist.attention.options import NoisyDotProductAttention
from genatt_dist.config import RunConfig
from genatt_dist.evaluation.evaluate import evaluate
from genatt_dist.serving.trained import Trained, load
from genatt_dist.study import calibrate
from genatt_dist.study.calibrate import find_noise, match, total_variation
from genatt_dist.study.inference import under
from genatt_dist.study.plan import Study


@pytest.mark.parametrize("target", [1e-4, 0.1, 0.5, 0.99])
def test_bisection_inverts_a_known_law(target: float) -> None:
    """1 − exp(−σ) moves by (1 − t) dσ, so a thousandth of t is this much of sigma."""
    sigma, found = find_noise(lambda noise: -math.expm1(-noise), target)
    assert found == pytest.approx(target, rel=1e-3)
    assert sigma == pytest.approx(-math.log1p(-target), abs=1.1e-3 * target / (1 - target))


@pytest.mark.parametrize(
    ("target", "message"),
    [(0.5, "no noise makes maps vary by 0.5000: with sigma=.* it is 0.3000"), (0.0, "0.0000 cannot be matched")],
)
def test_target_out_of_reach_is_refused(target: float, message: str) -> None:
    with pytest.raises(GenattError, match=message):
        find_noise(lambda noise: -0.3 * math.expm1(-noise), target)


@pytest.fixture(scope="module")
def trained(trained_run: Path) -> Trained:
    return load(trained_run)


class TestTrainedModel:
    @pytest.fixture
    def noisy(self, trained: Trained) -> Callable[[float], Trained]:
        """The dot-product weights with noise on the logits."""

        def make(noise: float) -> Trained:
            attention = NoisyDotProductAttention(noise=noise)
            return under(trained, trained.config.model.model_copy(update={"attention": attention}))

        return make

    def test_maps_without_noise_do_not_vary(self, trained: Trained) -> None:
        assert total_variation(trained, 2048) == 0

    def test_noise_that_was_found_gives_the_target(self, noisy: Callable[[float], Trained]) -> None:
        sigma, _ = find_noise(lambda noise: total_variation(noisy(noise), 2048), 0.15)
        assert total_variation(noisy(sigma), 2048) == pytest.approx(0.15, rel=1e-3)
        assert total_variation(noisy(2 * sigma), 2048) > 0.2

    def test_only_the_first_users_count(self, noisy: Callable[[float], Trained]) -> None:
        """All 45 users, in one batch or cut short of the last ones, are more than the first 5."""
        all_users = total_variation(noisy(1.0), 45)
        assert total_variation(noisy(1.0), 2048) == pytest.approx(all_users, rel=1e-6)
        assert total_variation(noisy(1.0), 5) != pytest.approx(all_users, rel=1e-3)

    def test_other_settings_keep_the_weights(self, trained: Trained, noisy: Callable[[float], Trained]) -> None:
        """Noisy attention that infers by the mean is the dot product it was made from, rank for rank."""

        def ranks(model: Trained) -> list[int]:
            of = (model.backbone, model.table, model.sequences, "test", model.config, model.device)
            return evaluate(*of).rank_U.tolist()

        assert ranks(noisy(3.0)) == ranks(trained)


class TestRounds:
    """`match` on a law instead of models: variation = sensitivity of the weights × sigma, and training changes it."""

    @pytest.fixture
    def study(self, prepared: Path) -> Study:
        noisy = {
            "overrides": {"model": {"attention": {"type": "noisy_dot_product"}}},
            "match_noise": {"weights": "plain", "target": "variational"},
        }
        arms = {"plain": {}, "variational": {"overrides": {"model": {"attention": {"type": "variational"}}}}}
        tree = {"base": run_tree(prepared), "arms": arms | {"noisy": noisy}, "comparisons": {"reference": "plain"}}
        return Study.model_validate(tree)

    @pytest.fixture
    def trainings(self, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, float]]:
        """(run, sigma) of each training asked for. Maps of `variational` vary by 0.2."""
        self.sensitivity = {"plain": 0.5}
        asked: list[tuple[str, float]] = []

        def variation(model: tuple[str, float | None], users: int) -> float:
            run, noise = model
            if run == "variational":
                return 0.2
            return self.sensitivity[run] * (dict(asked)[run] if noise is None else noise)

        monkeypatch.setattr(calibrate, "load", lambda run: (run.name, None))
        monkeypatch.setattr(calibrate, "under", lambda model, config: (model[0], config.attention.noise))
        monkeypatch.setattr(calibrate, "total_variation", variation)
        return asked

    def _match(self, study: Study, out: Path, trainings: list[tuple[str, float]], **sensitivity: float) -> Path:
        names = {name.replace("_", "-"): value for name, value in sensitivity.items()}

        def complete(config: RunConfig, run: Path) -> None:
            assert isinstance(config.model.attention, NoisyDotProductAttention)
            trainings.append((run.name, config.model.attention.noise))
            if run.name not in names:
                raise KeyboardInterrupt
            self.sensitivity |= names

        return match(study, out, "noisy", complete)

    def test_one_round_where_training_keeps_the_variation(
        self, study: Study, tmp_path: Path, trainings: list[tuple[str, float]]
    ) -> None:
        assert self._match(study, tmp_path, trainings, noisy_1=0.54) == tmp_path / "rounds" / "noisy-1"
        record = json.loads((tmp_path / "rounds" / "noisy.json").read_text())
        assert (record["target"], record["kept_round"], record["matched"]) == (0.2, 1, True)
        assert record["noise"] == pytest.approx(0.4, rel=1e-3)
        assert record["rounds"][0]["after_training"] == pytest.approx(0.216, rel=1e-3)

    def test_noise_is_found_again_on_the_weights_it_trained(
        self, study: Study, tmp_path: Path, trainings: list[tuple[str, float]]
    ) -> None:
        assert self._match(study, tmp_path, trainings, noisy_1=0.25, noisy_2=0.25) == tmp_path / "rounds" / "noisy-2"
        assert trainings == [("noisy-1", pytest.approx(0.4, rel=2e-3)), ("noisy-2", pytest.approx(0.8, rel=2e-3))]
        record = json.loads((tmp_path / "rounds" / "noisy.json").read_text())
        assert [one["found_on"] for one in record["rounds"]] == ["plain", "round 1"]

    def test_closest_round_is_kept_when_none_is_close_enough(
        self, study: Study, tmp_path: Path, trainings: list[tuple[str, float]]
    ) -> None:
        """Each training halves or doubles the sensitivity: 0.5 → 0.25 → 0.3 → 0.6."""
        run = self._match(study, tmp_path, trainings, noisy_1=0.25, noisy_2=0.3, noisy_3=0.6)
        record = json.loads((tmp_path / "rounds" / "noisy.json").read_text())
        assert [one["after_training"] for one in record["rounds"]] == pytest.approx([0.1, 0.24, 0.4], rel=2e-3)
        assert (run.name, record["kept_round"], record["matched"]) == ("noisy-2", 2, False)

    def test_stopped_calibration_goes_on_where_it_was(
        self, study: Study, tmp_path: Path, trainings: list[tuple[str, float]]
    ) -> None:
        with pytest.raises(KeyboardInterrupt):
            self._match(study, tmp_path, trainings, noisy_1=0.25)
        stopped = list(trainings)
        run = self._match(study, tmp_path, trainings, noisy_1=0.25, noisy_2=0.25)
        assert run.name == "noisy-2"
        assert trainings == [*stopped, stopped[-1]]  # round 2 with the sigma it began with; round 1 not again
