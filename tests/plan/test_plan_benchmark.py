"""The comparison of plans with runs, small."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import plan_check


def test_cases_are_configurations_that_differ() -> None:
    cases = plan_check.cases()
    assert len({case.config.model_dump_json() for case in cases}) == len(cases) >= 3
    assert {case.ranks for case in cases} == {1, 2}
    assert sum(case.kind == "held out" for case in cases) >= 3
    assert {case.kind for case in cases} == set(plan_check.KINDS)


@pytest.mark.slow
@pytest.mark.distributed
def test_a_small_comparison_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "check.json"
    arguments = ["plan_check", "--out", str(out), "--scale", "0.001", "--steps", "2", "--only", "1", "--repeats", "1"]
    monkeypatch.setattr(sys, "argv", arguments)
    assert plan_check.main() == 0
    (row,) = json.loads(out.read_text())["rows"]
    assert 0.5 < row["ratio"] < 1.5
    assert row["measured_step_seconds"] > 0
