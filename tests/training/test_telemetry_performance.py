"""What a run says of its speed: its log, its summary, and the table at the end."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from genatt_dist.evaluation.report import render
from genatt_dist.evaluation.report_data import read_models
from genatt_dist.training import performance
from genatt_dist.training.performance import Performance
from genatt_dist.training.performance_table import performance_table
from genatt_dist.training.timing import SECTIONS

CPU = torch.device("cpu")


def identity(value: torch.Tensor) -> torch.Tensor:
    return value


def test_every_train_record_says_where_its_time_went(trained_run: Path) -> None:
    records = [json.loads(line) for line in (trained_run / "metrics.jsonl").read_text().splitlines()]
    train = [record for record in records if record["kind"] == "train"]
    assert train
    for record in train:
        shares = [record["input_stall"], *(record[f"{name}_share"] for name in SECTIONS[1:])]
        assert 0.3 < sum(shares) <= 1.001
        assert record["lookup_share"] == 0  # a replicated table
        assert min(record["forward_share"], record["backward_share"], record["optimizer_share"]) > 0
        assert record["tokens_per_second"] > record["sequences_per_second"] > 0
        assert record["memory_gib"] > 0.05
    (last,) = (record for record in records if record["kind"] == "performance")
    assert last["flops_per_step"] > 0


def test_summary_has_a_performance_whose_parts_add_up(trained_run: Path) -> None:
    found = json.loads((trained_run / "summary.json").read_text())["performance"]
    seconds = dict(found["step_seconds"])
    assert sum(seconds.values()) - seconds["total"] == pytest.approx(seconds["total"], abs=1e-5)
    assert seconds["other"] < 0.7 * seconds["total"]
    assert found["input_stall"] == pytest.approx(seconds["input"] / seconds["total"], abs=1e-3)
    assert "exchange_share" not in found  # of one rank
    assert list(found["peak_memory_gib"]) == ["host"]
    rate = found["flops_per_step"] / seconds["total"]
    assert found["fraction_of_matmul_peak"] == pytest.approx(rate / found["matmul_peak_flops"], abs=1e-4)
    assert 0 < found["fraction_of_matmul_peak"] < 1
    assert (found["precision"], found["threads"]) == ("float32", 1)


def steps(measured: Performance, count: int, work: Any = lambda: None) -> None:
    for _ in range(count):
        with measured.step([SimpleNamespace(num_sequences=4, num_tokens=10)] * 2):
            work()


def test_the_first_interval_is_left_out_once_there_is_another(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(performance.time, "perf_counter", lambda: now)
    monkeypatch.setattr(performance, "matmul_peak", lambda device, dtype: 1e6)
    measured = Performance(CPU, torch.bfloat16, 0, 1)
    assert measured.summary(identity) == {}
    a_MM = torch.ones(10, 10)
    steps(measured, 2, lambda: a_MM @ a_MM)  # the second one is counted
    now = 100.0
    seconds, speed = measured.interval(since=0.0)
    assert (seconds, speed["sequences_per_second"], speed["tokens_per_second"]) == (100, 0.2, 0.4)
    assert measured.summary(identity)["step_seconds"]["total"] == 50
    for _ in range(2):
        steps(measured, 4)
        now += 2.0
        measured.interval(since=now - 2.0)
    found = measured.summary(identity)
    assert (found["steps"], found["sequences_per_second"], found["tokens_per_second"]) == (8, 16, 40)
    assert found["step_seconds"]["total"] == found["step_seconds"]["other"] == 0.5
    assert (found["flops_per_step"], found["precision"]) == (2000, "bfloat16")
    assert found["fraction_of_matmul_peak"] == pytest.approx(2000 / 0.5 / 1e6)


def test_ranks_tell_their_memory_and_the_mean_of_their_sections(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 1 of two, that got rank 0's row by the sum; it measures no peak."""
    monkeypatch.setattr(performance, "_peak_memory", lambda device: (3 << 30, 0))
    measured = Performance(CPU, torch.float32, 1, 2)
    steps(measured, 3)  # the third is watched
    measured.interval(performance.time.perf_counter() - 3.0)

    def total(own_RM: torch.Tensor) -> torch.Tensor:
        assert own_RM[1, 0] == 3
        assert not own_RM[0].any()
        own_RM[0, :4] = torch.tensor([5.0, 0.0, 0.6, 1.2], dtype=torch.float64)
        own_RM[0, -2:] = torch.tensor([0.2, 0.3], dtype=torch.float64)
        return own_RM

    found = measured.summary(total)
    assert found["peak_memory_gib"] == {"host": [5.0, 3.0]}
    assert found["step_seconds"]["input"] == pytest.approx(0.1)  # 0.6 s in three steps, of one rank in two
    assert found["exchange_seconds"] == pytest.approx(0.1)  # the mean of 0.2 and nothing
    assert found["own_seconds"][0] == pytest.approx(0.3)
    assert "flops_per_step" not in found


def test_the_table_is_small_and_complete(trained_run: Path) -> None:
    found = json.loads((trained_run / "summary.json").read_text())["performance"]
    console = Console(width=100, record=True, file=None, quiet=False)
    with console.capture() as captured:
        console.print(performance_table(found))
    text = captured.get()
    for name in ("one step", *SECTIONS, "other", "sequences/s", "tokens/s", "host memory", "GFLOP/s"):
        assert name in text
    assert len(text.splitlines()) <= 5
    with console.capture() as captured:  # of two GPUs, without counted operations
        console.print(
            performance_table(
                {name: found[name] for name in ("step_seconds", "sequences_per_second", "tokens_per_second")}
                | {"peak_memory_gib": {"host": [1.0, 2.0], "device": [3.5, 3.25]}}
            )
        )
    assert "device memory 3.50 GiB (largest of 2 ranks)" in " ".join(captured.get().split())  # wherever it wraps


def test_report_shows_where_the_steps_went(tmp_path: Path) -> None:
    values = {"step_seconds/total": 0.02, "step_seconds/input": 0.0055, "tokens_per_second": 4714.5}
    record = {"kind": "performance", "step": 4, **values, "peak_memory_gib/host": [0.5, 0.75]}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(record | {"fraction_of_matmul_peak": 0.125}) + "\n")
    report: dict[str, Any] = {"models": [{"name": "gru"}, {"name": "popularity"}]}
    page = render(report, read_models(report, {"gru": tmp_path}))
    section = page[page.index("<h2>Performance</h2>") :].partition("</section>")[0]
    for text in ("input, ms", "<td>20.0</td>", "<td>5.5</td>", "<td>4,714.5</td>", "<td>0.8</td>", "<td>12.5%</td>"):
        assert text in section
    assert "popularity" not in section
    assert "<h2>Performance</h2>" not in render(report, read_models(report, {}))
