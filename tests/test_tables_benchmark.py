"""The table benchmarks run, and their ratios and verdicts are what their docstrings say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.tables import compare, targets


def _row(rows: int, precision: str, seconds: list[float], peak: int, held: int) -> dict[str, Any]:
    made = {"row_bytes": held - 4, "state_bytes": 4, "before": {"now": 100}, "after": {"peak": 100 + 2 * held}}
    return {
        "rows": rows,
        "precision": precision,
        "step_seconds": seconds,
        "peak_bytes": [peak, peak + 10],
        "made": [made, made],
    }


def test_ratios_compare_each_round_and_the_rank_that_grew_most() -> None:
    rows = [
        _row(10, "fp32", [1.0, 2.0, 4.0], 1000, 10),
        _row(1000, "fp32", [1.1, 2.4, 8.0], 1100, 100),
        _row(9000, "fp16", [9.0, 9.0, 9.0], 9000, 100),
    ]
    rows[1]["peak_bytes"][1] += 30
    compare(rows)
    assert rows[1]["time_ratio"] == pytest.approx(1.2)
    assert rows[1]["memory_ratio"] == pytest.approx(1.3)
    assert rows[1]["creation_ratio"] == pytest.approx(2)
    assert [(one["target"], one["met"]) for one in targets(rows)] == [("time_ratio", True), ("memory_ratio", False)]


def _run(module: str, out: Path, *arguments: str) -> dict[str, Any]:
    command = [sys.executable, "-m", module, *arguments, "--out", str(out)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=170, env=os.environ | {"BENCHMARK_STDERR": "1"}
    )
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(out.read_text())
    return result


@pytest.mark.slow
@pytest.mark.distributed
def test_the_table_benchmark_trains_and_draws(tmp_path: Path) -> None:
    out = tmp_path / "tables.json"
    small = ["--batch", "16", "--length", "6", "--users", "64", "--negatives", "8", "--width", "8"]
    result = _run("benchmarks.tables", out, "--rows", "300", *small, "--rounds", "1", "--steps", "2", "--warmup", "1")
    (row,) = result["rows"]
    assert row["time_ratio"] == 1
    assert sum(row["held_bytes"]) == 301 * (8 * 4 + 4)
    assert 0 < row["loss"] < 10
    assert out.with_suffix(".png").stat().st_size > 1000


@pytest.mark.exhaustive
@pytest.mark.distributed
def test_the_lookup_benchmark_measures_all_variants(tmp_path: Path) -> None:
    small = ["--rows", "500", "--ids", "200", "--dense-ms", "1", "--rounds", "1", "--steps", "2"]
    result = _run("benchmarks.lookups", tmp_path / "lookups.json", *small)
    assert set(result["milliseconds"]) == {"once", "repeated", "ahead"}
    assert result["ids_a_step"]["once"] < result["ids_a_step"]["repeated"] == 1224
