"""MLflow gets what metrics.jsonl gets, when it is asked for."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from data_pipeline.errors import GenattError
from genatt_dist.training.telemetry import Telemetry


def _run(folder: Path) -> Path:
    (folder / "config.yaml").write_text("seed: 1\n")
    return folder


def test_tracking_uri_sends_the_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[Any] = []
    fake = SimpleNamespace(
        start_run=lambda run_name: said.append(run_name),
        log_dict=lambda tree, name: said.append((tree, name)),
        log_metrics=lambda values, step: said.append((values, step)),
        end_run=lambda status: said.append(status),
    )
    monkeypatch.setitem(sys.modules, "mlflow", fake)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "file:nowhere")
    with Telemetry(_run(tmp_path), "title", 10, active=True) as telemetry:
        telemetry.record("valid", 3, {"ndcg@10": 0.5})
    assert said == [tmp_path.name, ({"seed": 1}, "config.json"), ({"valid/ndcg_at_10": 0.5}, 3), "FINISHED"]


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
