"""The ranking benchmark runs from end to end on two ranks and says what it measured."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.distributed
def test_benchmark_writes_a_row_for_each_setting(tmp_path: Path) -> None:
    out = tmp_path / "ranking.json"
    words = ["--items", "300", "501", "--users", "8", "20", "--batch-users", "8", "--chunk-items", "64", "--width", "4"]
    subprocess.run(
        [sys.executable, "-m", "benchmarks.ranking", *words, "--out", str(out)], cwd=ROOT, check=True, timeout=240
    )
    rows = json.loads(out.read_text())["rows"]
    assert [(row["items"], row["users"]) for row in rows] == [(300, 8), (300, 20), (501, 8)]
    assert all(row["rank_seconds"] > 0 and row["peak_mb"] >= 0 and 0 < row["coverage@20"] <= 1 for row in rows)
