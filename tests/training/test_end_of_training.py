"""The evaluation that a run ends by is known as its last, whatever ends the run: signs are told there at once."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from genatt_dist import config as configuration
from genatt_dist.evaluation.diagnose import Diagnosis
from genatt_dist.training import trainer, validation
from genatt_dist.training.checkpoint.progress import Progress
from genatt_dist.training.mark import Mark
from genatt_dist.training.performance import Performance
from genatt_dist.training.stopping import Agreement
from genatt_dist.training.warnings import FailureSigns


class Idle(trainer.Trainer):
    """The loop over epochs with nothing to train."""

    def __init__(self, run: Path, **training: object) -> None:
        config = {"data": {"path": "x"}, "training": training}
        run.mkdir(exist_ok=True)
        self._run, self._config, self._device = run, configuration.parse(config, "of a test"), torch.device("cpu")
        self._rank, self._world_size, self._launcher, self._total_steps = 0, 1, "process", 100
        self.learner = SimpleNamespace(  # type: ignore[assignment]
            performance=Performance(self._device, torch.float32, 0, 1), evaluating=lambda: nullcontext((None, None))
        )
        self._sequences = None  # type: ignore[assignment]
        self._progress, self._notes = Progress("hash"), []
        self._checkpointing = mock.MagicMock()
        self._mark, self._agreement = Mark(), Agreement(None)
        self.saved: list[tuple[int, int]] = []

    def _train_epoch(self) -> None:
        self._progress.step += 10
        self._progress.step_seconds += 1.0

    def _save(self) -> None:
        self.saved.append((self._progress.epoch, self._progress.step))


@pytest.fixture
def lasts(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, bool]]:
    """(epoch, last) of every look at the signs. The third evaluation is the best."""
    seen: list[tuple[int, bool]] = []
    scores = iter((0.1, 0.2, 0.3, *[0.25] * 20))

    def evaluate(*of: object) -> SimpleNamespace:
        return SimpleNamespace(metrics={"ndcg@10": next(scores), "recall@10": 0.5})

    def look(self: FailureSigns, record: dict[str, Any], last: bool, tell: bool = True) -> list[object]:
        seen.append((record["epoch"], last))
        return []

    monkeypatch.setattr(validation, "evaluate", evaluate)
    monkeypatch.setattr(validation, "diagnose", lambda *of: Diagnosis({}, {}))
    monkeypatch.setattr(trainer, "write_environment", lambda *of: None)
    for name, value in {"broadcast": None, "get_rank": 0, "get_world_size": 1}.items():
        monkeypatch.setattr(trainer.dist, name, lambda *of, value=value: value)
    monkeypatch.setattr(FailureSigns, "look", look)
    return seen


def test_patience_ends_a_run_by_its_last_evaluation(lasts: list[tuple[int, bool]], tmp_path: Path) -> None:
    summary = Idle(tmp_path, epochs=20, patience=2).run()
    assert lasts == [(1, False), (2, False), (3, False), (4, False), (5, True)]
    assert summary.train["epochs"] == 5


def test_epochs_and_time_end_it_too(lasts: list[tuple[int, bool]], tmp_path: Path) -> None:
    Idle(tmp_path / "epochs", epochs=3, evaluate_every=2).run()
    assert lasts == [(2, False), (3, True)]
    lasts.clear()
    Idle(tmp_path / "time", epochs=20, max_seconds=1e-6, evaluate_every=5).run()
    assert lasts == [(1, True)]


def test_a_checkpoint_due_at_an_epochs_end_is_written_with_and_without_an_evaluation(
    lasts: list[tuple[int, bool]], tmp_path: Path
) -> None:
    idle = Idle(tmp_path, epochs=5, evaluate_every=4, checkpoint_every=20)  # an epoch has 10 updates
    idle.run()
    assert lasts == [(4, False), (5, True)]
    assert idle.saved == [(2, 20), (4, 40), (5, 50)]


def test_a_run_that_was_never_evaluated_is_not_over_when_its_time_is(
    lasts: list[tuple[int, bool]], tmp_path: Path
) -> None:
    """As when it goes on with data that grew: it would have no metrics to end with."""
    idle = Idle(tmp_path, epochs=5, max_seconds=1e-6)
    idle._progress = Progress("hash", 20, 2, seconds=9.0)
    assert idle.run().valid
    assert lasts == [(3, True)]


def test_an_epoch_that_was_begun_is_ended_although_time_is_up(lasts: list[tuple[int, bool]], tmp_path: Path) -> None:
    """One that ended is not followed by another."""
    for batch, looked in ((3, [(3, True)]), (0, [])):
        idle = Idle(tmp_path, epochs=5, max_seconds=1e-6)
        idle._progress = Progress("hash", 20, 2, batch, seconds=9.0, best_step=10, best_metrics={"ndcg@10": 0.05})
        assert idle.run().valid
        assert lasts == looked
        lasts.clear()
