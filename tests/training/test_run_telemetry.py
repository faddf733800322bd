"""Everything a report shows about a run is in a file of its directory, and only rank 0 writes."""

import json
import math
import re
from pathlib import Path

import pytest
import torch

from genatt_dist.training.telemetry import Telemetry, facade, write_environment
from genatt_dist.training.warnings import FailureSign


def test_each_record_is_a_line_of_json_and_a_point_of_a_curve(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with Telemetry(tmp_path, "dot_product", 10, active=True) as telemetry:
        telemetry.record("train", 5, {"loss": 2.5, "epoch": 0})
        first = (tmp_path / "metrics.jsonl").read_text()
        assert first.endswith("}\n")  # a run that is killed loses no whole line
        telemetry.record("valid", 5, {"ndcg@10": 0.25})
        telemetry.advance(5, "going on")
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["kind"], line["step"]) for line in lines] == [("train", 5), ("valid", 5)]
    assert lines[0]["loss"] == 2.5
    assert lines[0]["time"] > 1e9
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(point.step, point.value) for point in events.Scalars("valid/ndcg@10")] == [(5, 0.25)]
    assert [point.value for point in events.Scalars("train/loss")] == [2.5]


def test_where_no_bar_is_drawn_a_line_now_and_then_says_how_far_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with Telemetry(tmp_path, "x", 10, active=True) as telemetry:
        telemetry.advance(1, "epoch 1")
        assert capsys.readouterr().err == ""
        monkeypatch.setattr(facade, "_LINE_SECONDS", 0.0)
        telemetry.advance(2)  # nothing new to tell
        telemetry.advance(4, "epoch 1 loss 2.5000")
    told = capsys.readouterr().err
    assert re.fullmatch(r"step 4 of 10: epoch 1 loss 2.5000(, about \d:\d\d:\d\d left)?\n", told), told


def test_vectors_are_lists_there_and_histograms_here(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with Telemetry(tmp_path, "x", 10, active=True) as telemetry:
        telemetry.record("valid", 5, {"kl_mean/block0": 0.2, "kl_per_dimension/block0": [0.1, 0.3]})
        telemetry.record("valid", 6, {"kl_mean/block0": math.nan, "kl_per_dimension/block0": [math.nan] * 2})
    first, second = (json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert first["kl_per_dimension/block0"] == [0.1, 0.3]
    assert math.isnan(second["kl_per_dimension/block0"][0])
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    (histogram,) = events.Histograms("valid/kl_per_dimension/block0")
    assert histogram.step == 5
    assert (histogram.histogram_value.num, histogram.histogram_value.sum) == (2, pytest.approx(0.4))


def test_a_failure_sign_is_on_the_console_in_the_log_and_on_the_board(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    sign = FailureSign("determinism", 1, 0.001, 0.02, "determinism in block 1: [0.001]. Remedy: x.")
    with Telemetry(tmp_path, "x", 10, active=True) as telemetry:
        telemetry.warn(7, sign)
        assert telemetry.records()[0]["text"] == sign.text
    assert "warning: determinism in block 1: [0.001]. Remedy: x.\n" in capsys.readouterr().err
    (line,) = (json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert (line["kind"], line["step"], line["sign"], line["value"]) == ("warning", 7, "determinism", 0.001)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Tags()["tensors"] == ["warnings/text_summary"]


def test_other_ranks_write_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Telemetry(tmp_path, "x", 2, active=False) as telemetry:
        telemetry.record("train", 1, {"loss": 1.0})
        telemetry.say("hello")
        telemetry.warn(1, FailureSign("determinism", 0, 0.0, 0.02, "text"))
        assert telemetry.records() == []
        telemetry.advance(1, "status")
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr() == ("", "")


def test_messages_go_to_stderr_as_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Telemetry(tmp_path, "x", 2, active=True) as telemetry:
        telemetry.say("[3 s] not markup")
    out, err = capsys.readouterr()
    assert out == ""
    assert "[3 s] not markup\n" in err


def test_environment_names_versions_and_hardware_but_no_variables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOME_TOKEN", "secret-value")
    write_environment(tmp_path, torch.device("cpu"))
    text = (tmp_path / "environment.json").read_text()
    environment = json.loads(text)
    assert {"torch", "torchrec", "deepspeed", "ray"} <= environment["versions"].keys()
    assert environment["device"] == "cpu"
    assert environment["cpu_count"] >= 1
    assert "secret-value" not in text


def test_a_finished_run_holds_all_its_files(trained_run: Path) -> None:
    names = {path.name for path in trained_run.iterdir()}
    assert {"config.yaml", "metrics.jsonl", "tensorboard", "checkpoints", "environment.json", "summary.json"} <= names
    lines = [json.loads(line) for line in (trained_run / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines if line["kind"] == "valid"] == [1, 2]
    assert all(0 < line["attention_entropy/block0"] <= 1 for line in lines if line["kind"] == "valid")
    losses = [line["loss"] for line in lines if line["kind"] == "train"]
    assert losses[-1] < losses[0]
    summary = json.loads((trained_run / "summary.json").read_text())
    assert (summary["train"]["epochs"], summary["train"]["launcher"]) == (2, "process")
    best = max((line for line in lines if line["kind"] == "valid"), key=lambda line: line["ndcg@10"])
    assert summary["valid"]["ndcg@10"] == best["ndcg@10"]


def test_every_number_of_a_run_is_a_point_of_a_curve(trained_run: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    lines = [json.loads(line) for line in (trained_run / "metrics.jsonl").read_text().splitlines()]
    expected = {
        (f"{line['kind']}/{name}", line["step"]): value
        for line in lines
        for name, value in line.items()
        if name not in ("kind", "step", "time") and not isinstance(value, list)
    }
    events = EventAccumulator(str(trained_run / "tensorboard"))
    events.Reload()
    found = {(name, point.step): point.value for name in events.Tags()["scalars"] for point in events.Scalars(name)}
    assert found == pytest.approx(expected)
    assert "valid/attention_entropy/block0" in events.Tags()["scalars"]


def test_resumed_run_forgets_what_came_after_its_checkpoint(tmp_path: Path) -> None:
    """Those steps are run again; a report would draw them twice. A line that a kill cut off goes too."""
    with Telemetry(tmp_path, "x", 4, active=True) as telemetry:
        for step in (1, 2, 3):
            telemetry.record("train", step, {"loss": float(step)})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')
    with Telemetry(tmp_path, "x", 4, active=True, first_step=2) as telemetry:
        telemetry.record("train", 3, {"loss": 30.0})
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(record["step"], record["loss"]) for record in records] == [(1, 1.0), (2, 2.0), (3, 30.0)]
