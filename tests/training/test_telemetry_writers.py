"""Optional writers get every record, and none can stop or slow training: they fail, hang and lag in the background."""

import json
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from data_pipeline.errors import GenattError
from genatt_dist.training.telemetry import Telemetry, background, facade, ray_metrics
from genatt_dist.training.telemetry.background import Background
from genatt_dist.training.warnings import FailureSign

SIGN = FailureSign("determinism", 1, 0.001, 0.02, "all the same")
SECRET = "https://user:secret@server"


class Kept:
    """A writer that keeps what it is told; `before` is called first each time."""

    def __init__(self, before: Callable[[], object] = lambda: None) -> None:
        self.told: list[Any] = []
        self._before = before

    def record(self, kind: str, step: int, values: Any) -> None:
        self._before()
        self.told.append((kind, step, dict(values)))

    def warn(self, step: int, sign: FailureSign) -> None:
        self.told.append(("warning", step, sign.name))

    def close(self, failed: bool) -> None:
        self.told.append("failed" if failed else "done")


def told_by(writer: Background, records: int, seconds: float) -> None:
    for step in range(records):
        writer.record("train", step, {"loss": 1.0})
    writer.close(failed=False)
    writer.join(time.monotonic() + seconds)


def test_everything_arrives_in_order_in_one_thread() -> None:
    kept, threads, lines = Kept(lambda: threads.add(threading.get_ident())), set[int](), list[str]()
    writer = Background("it", lambda: kept, lines.append)
    writer.record("train", 1, {"loss": 1.0})
    writer.warn(2, SIGN)
    writer.close(failed=True)
    writer.join(time.monotonic() + 5)
    assert kept.told == [("train", 1, {"loss": 1.0}), ("warning", 2, "determinism"), "failed"]
    assert len(threads) == 1
    assert threading.get_ident() not in threads
    assert lines == []


@pytest.mark.parametrize("at_start", [True, False])
def test_a_writer_that_fails_is_one_line_without_its_address(at_start: bool) -> None:
    def fail() -> Any:
        raise ConnectionError(f"{SECRET} does not answer")

    lines: list[str] = []
    told_by(Background("W&B", fail if at_start else lambda: Kept(fail), lines.append), 100, 5)
    (line,) = lines
    assert "W&B failed (ConnectionError)" in line
    assert "training goes on" in line
    assert "secret" not in line


def test_a_writer_that_hangs_costs_the_time_limit_and_one_line() -> None:
    forever, lines = threading.Event(), list[str]()
    started = time.monotonic()
    told_by(Background("MLflow", lambda: Kept(forever.wait), lines.append), 5000, 0.3)
    assert time.monotonic() - started < 10
    forever.set()
    (line,) = lines
    assert "MLflow is too slow" in line


def test_a_writer_that_lags_keeps_what_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background, "_MOST_WAITING", 4)
    go, lines = threading.Event(), list[str]()
    kept = Kept(go.wait)
    writer = Background("it", lambda: kept, lines.append)
    for step in range(20):
        writer.record("train", step, {})
    go.set()
    while writer._waiting.qsize():
        time.sleep(0.01)
    writer.record("train", 20, {})
    writer.close(failed=False)
    writer.join(time.monotonic() + 5)
    assert kept.told[0] == ("train", 0, {})
    assert kept.told[-2:] == [("train", 20, {}), "done"]
    assert len(kept.told) < 20
    assert len(lines) == 1


def test_training_goes_on_without_a_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where the disk is full for the events of TensorBoard; metrics.jsonl has everything."""

    def gone(*_: Any, **__: Any) -> Any:
        raise OSError(f"no route to {SECRET}")

    monkeypatch.setitem(sys.modules, "mlflow", SimpleNamespace(start_run=gone))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", SECRET)
    monkeypatch.setattr(facade, "TensorBoard", gone)
    with Telemetry(tmp_path, "x", 10, active=True) as telemetry:
        telemetry.record("train", 1, {"loss": 2.0})
        telemetry.finish(1, {"steps": 1, "precision": "float32", "step_seconds": {"total": 0.5}, "sizes": [1.0, 2.0]})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["kind"] for line in lines] == ["train", "performance"]
    assert lines[1].items() >= {"steps": 1, "step_seconds/total": 0.5, "sizes": [1.0, 2.0]}.items()
    assert "precision" not in lines[1]
    errors = capsys.readouterr().err
    assert "MLflow failed (OSError)" in errors
    assert "TensorBoard failed (OSError)" in errors
    assert "secret" not in errors


def test_a_failed_run_does_not_wait_long_for_a_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is to make room has seconds to end."""
    forever = threading.Event()
    monkeypatch.setattr(facade, "_FAILED_END_SECONDS", 0.2)
    monkeypatch.setattr(facade, "TensorBoard", lambda *_: Kept(forever.wait))
    telemetry = Telemetry(tmp_path, "x", 10, active=True)
    telemetry.record("train", 1, {"loss": 2.0})
    started = time.monotonic()
    telemetry.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert time.monotonic() - started < 10
    forever.set()


# --- Weights & Biases -------------------------------------------------------------------------------------------------


class Wandb:
    """What of the client is used."""

    def __init__(self, step: int = 0) -> None:
        self.asked: dict[str, Any] = {}
        self.logged: list[Any] = []
        self.Settings = self.Histogram = lambda *given, **named: given or named
        self._step = step

    def init(self, **asked: Any) -> Any:
        self.asked = asked
        self.run = SimpleNamespace(
            step=self._step,
            summary={},
            log=lambda values, step: self.logged.append((values, step)),
            finish=lambda exit_code: self.logged.append(exit_code),
        )
        return self.run


def test_a_project_opts_in_to_wandb_and_its_run_is_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.yaml").write_text("seed: 1\n")
    wandb = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setenv("WANDB_PROJECT", "recommenders")
    with Telemetry(tmp_path, "x", 10, active=True) as telemetry:
        telemetry.record("valid", 0, {"ndcg@10": 0.5, "kl": [0.1, float("nan")]})
        telemetry.warn(4, SIGN)
    asked = wandb.asked
    assert (asked["project"], asked["name"], asked["resume"]) == ("recommenders", tmp_path.name, "allow")
    assert asked["config"] == {"seed": 1}
    assert asked["dir"] == str(tmp_path)
    assert wandb.logged == [({"valid/ndcg@10": 0.5, "valid/kl": ([0.1],)}, 0), 0]
    assert wandb.run.summary == {"warning/determinism": "step 4: all the same"}

    again = Wandb(step=6)  # the server knows updates up to 5
    monkeypatch.setitem(sys.modules, "wandb", again)
    with Telemetry(tmp_path, "x", 10, active=True, first_step=3) as telemetry:
        for step in (4, 5, 6):
            telemetry.record("train", step, {"loss": 1.0})
    assert again.asked["id"] == asked["id"] == json.loads((tmp_path / "tracking.json").read_text())["wandb"]
    assert again.logged == [({"train/loss": 1.0}, 6), 0]


def test_a_key_alone_asks_for_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    with Telemetry(tmp_path, "x", 10, active=True):
        pass


def test_a_project_without_wandb_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setenv("WANDB_PROJECT", "recommenders")
    with pytest.raises(GenattError, match=r"pip install 'genatt-dist\[wandb\]'"):
        Telemetry(tmp_path, "x", 10, active=True)


@pytest.mark.slow
def test_wandb_offline_writes_into_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed (pip install 'genatt-dist[wandb]')")
    (tmp_path / "config.yaml").write_text("seed: 1\n")
    for name, value in {"WANDB_PROJECT": "p", "WANDB_MODE": "offline", "WANDB_SILENT": "true"}.items():
        monkeypatch.setenv(name, value)
    with Telemetry(tmp_path, "x", 10, active=True) as telemetry:
        telemetry.record("train", 1, {"loss": 2.0})
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


# --- Ray --------------------------------------------------------------------------------------------------------------


class Metric:
    """ray.util.metrics' metrics: those made, by name, and what they were told."""

    made: ClassVar[dict[str, list[Any]]] = {}

    def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]) -> None:
        assert name.isidentifier(), "Prometheus takes no other"
        assert name not in self.made
        self._told, self._keys = self.made.setdefault(name, []), tag_keys

    def set(self, value: float, tags: dict[str, str]) -> None:
        assert tuple(tags) == self._keys
        self._told.append((value, *tags.values()))

    inc = set


@pytest.fixture
def in_ray(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Any]]:
    monkeypatch.setattr(Metric, "made", {})
    monkeypatch.setitem(sys.modules, "ray.util", SimpleNamespace(metrics=SimpleNamespace(Gauge=Metric, Counter=Metric)))
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(is_initialized=lambda: True))
    monkeypatch.setenv("RANK", "3")
    return Metric.made


@pytest.mark.parametrize("active", [True, False])
def test_every_rank_exports_its_numbers_inside_ray(
    tmp_path: Path, in_ray: dict[str, list[Any]], active: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    tags = (tmp_path.name, "3")
    with Telemetry(tmp_path, "x", 10, active=active, first_step=10) as telemetry:
        telemetry.record("train", 20, {"loss": 2.0, "generative_loss": float("nan")})
        telemetry.record("valid", 20, {"ndcg@10": 0.5, "kl/block0": 0.25, "kl_per_dimension/block0": [0.1]})
        telemetry.record("train", 25, {"loss": 1.5})
        telemetry.warn(25, SIGN)
    assert in_ray == {
        "genatt_steps": [(10, *tags), (5, *tags)],
        "genatt_warnings": [(1, *tags, "determinism")],
        "genatt_train_loss": [(2.0, *tags), (1.5, *tags)],
        "genatt_valid_ndcg_at_10": [(0.5, *tags)],
        "genatt_valid_kl_block0": [(0.25, *tags)],
    }
    assert bool(list(tmp_path.iterdir())) == active


def test_outside_ray_nothing_is_exported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(is_initialized=lambda: False))
    assert not ray_metrics.in_ray()
    monkeypatch.delitem(sys.modules, "ray")
    assert not ray_metrics.in_ray()
