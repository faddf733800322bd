"""The benchmark of the full softmax runs, and its verdict is of the rows that it names."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.softmax import verdict

ROOT = Path(__file__).parents[1]


def test_time_is_judged_where_both_fit_and_memory_at_the_largest() -> None:
    rows = [
        {"items": 10, "ratio": 1.5, "replicated_share": 0.9, "sharded_share": 0.9},
        {"items": 20, "ratio": 1.3, "replicated_share": 0.2, "sharded_share": 0.2},
        {"items": 30, "replicated_share": 0.04, "sharded_share": 0.06},
    ]
    judged = verdict(rows)
    assert {name: one["met"] for name, one in judged.items()} == {
        "time at 20 items": True, "replicated memory at 30 items": True, "sharded memory at 30 items": False,
    }  # fmt: skip
    assert "time" not in " ".join(verdict(rows[2:]))


@pytest.mark.slow
def test_it_measures_both_tables(tmp_path: Path) -> None:
    out = tmp_path / "softmax.json"
    command = [sys.executable, "-m", "benchmarks.softmax", "--items", "3000", "--tokens", "64", "--rounds", "1"]
    done = subprocess.run(
        [*command, "--out", str(out)], cwd=ROOT, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert str(tmp_path) not in out.read_text()
    (row,) = result["rows"]
    assert row["logits_bytes"] == 4 * 3000 * 64
    assert row["ratio"] > 0
    assert row["gradient_error"] < 1e-5
    assert len(row["sharded_bytes"]) == 2
    assert out.with_suffix(".png").is_file()
