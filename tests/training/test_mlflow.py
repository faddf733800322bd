"""MLflow gets what metrics.jsonl gets, when it is asked for; a resumed run goes on in the same run there."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from data_pipeline.errors import GenattError
from genatt_dist.training.telemetry import Telemetry
from genatt_dist.training.warnings import FailureSign


class Server:
    """What of the client is used. history: updates that the server knows of the run."""

    def __init__(self, history: tuple[int, ...] = ()) -> None:
        self.said: list[Any] = []
        self._history = history

    def start_run(self, **of: str) -> Any:
        self.said.append(of)
        return SimpleNamespace(info=SimpleNamespace(run_id="known"))

    def log_dict(self, tree: Any, name: str) -> None:
        self.said.append((tree, name))

    def log_metrics(self, values: dict[str, float], step: int) -> None:
        self.said.append((values, step))

    def set_tag(self, name: str, text: str) -> None:
        self.said.append((name, text))

    def end_run(self, status: str) -> None:
        self.said.append(status)

    def MlflowClient(self) -> Any:
        def points(run: str, name: str) -> list[Any]:
            assert (run, name) == ("known", "train/loss")
            return [SimpleNamespace(step=step) for step in self._history]

        return SimpleNamespace(get_metric_history=points)


def _run(folder: Path) -> Path:
    (folder / "config.yaml").write_text("seed: 1\n")
    return folder


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Server:
    found = Server()
    monkeypatch.setitem(sys.modules, "mlflow", found)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "file:nowhere")
    return found


def test_tracking_uri_sends_the_numbers(tmp_path: Path, server: Server) -> None:
    with Telemetry(_run(tmp_path), "title", 10, active=True) as telemetry:
        telemetry.record("valid", 3, {"ndcg@10": 0.5, "kl_per_dimension/block0": [0.1]})
        telemetry.warn(4, FailureSign("determinism", 1, 0.001, 0.02, "all the same"))
    assert server.said == [
        {"run_name": tmp_path.name},
        ({"seed": 1}, "config.json"),
        ({"valid/ndcg_at_10": 0.5}, 3),
        ("warning.determinism", "step 4: all the same"),
        "FINISHED",
    ]


def test_resumed_run_goes_on_in_its_run_and_sends_no_point_twice(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    telemetry = Telemetry(_run(tmp_path), "title", 10, active=True)
    telemetry.record("train", 4, {"loss": 1.0})
    telemetry.__exit__(RuntimeError, RuntimeError(), None)
    assert server.said[-1] == "FAILED"
    assert json.loads((tmp_path / "tracking.json").read_text()) == {"mlflow": "known"}

    again = Server(history=(2, 4))
    monkeypatch.setitem(sys.modules, "mlflow", again)
    with Telemetry(tmp_path, "title", 10, active=True, first_step=2) as telemetry:
        for step in (3, 4, 5):
            telemetry.record("train", step, {"loss": 1.0})
    assert again.said[0] == {"run_id": "known"}
    assert [said[1] for said in again.said[2:-1]] == [4, 5]
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == [3, 4, 5]


def test_tracking_uri_without_mlflow_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "file:nowhere")
    with pytest.raises(GenattError, match=r"pip install 'genatt-dist\[mlflow\]'"):
        Telemetry(_run(tmp_path), "title", 10, active=True)


def test_nothing_is_asked_of_mlflow_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with Telemetry(_run(tmp_path), "title", 10, active=True) as telemetry:
        telemetry.record("train", 1, {"loss": 1.0})
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 1
