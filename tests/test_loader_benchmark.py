"""The benchmark of the loader runs, and its summary is what its rows say."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.loader import summary


def test_the_summary_is_of_all_rounds_of_a_setting() -> None:
    rows = [
        {
            "max_len": 50, "setting": setting, "round": number, "ratio": ratio, "trainer_seconds": seconds,
            "waited_seconds": waited, "input_stall": waited / seconds, "loader_tokens_per_second": 10 * ratio,
            "trainer_tokens_per_second": 10.0,
        }
        for setting, number, ratio, seconds, waited in (
            ("kept", 0, 5.0, 4.0, 1.0),
            ("kept", 1, 7.0, 4.0, 0.0),
            ("kept", 2, 9.0, 2.0, 0.0),
            ("streamed", 0, 3.0, 1.0, 0.5),
        )
    ]  # fmt: skip
    kept, streamed = summary(rows)
    assert (kept["ratio"], kept["loader_tokens_per_second"]) == (7.0, 70.0)
    assert (kept["input_stall"], kept["first_epoch"]) == (0.1, 0.25)
    assert (streamed["setting"], streamed["ratio"], streamed["input_stall"]) == ("streamed", 3.0, 0.5)


@pytest.mark.slow
def test_it_runs_on_prepared_data(prepared: Path, tmp_path: Path) -> None:
    out = tmp_path / "loader.json"
    command = [sys.executable, "-m", "benchmarks.loader", "--shards", str(prepared), "--out", str(out)]
    overrides = ["model.hidden_size=16", "training.batch_sequences=16"]
    subprocess.run([*command, "--max-len", "8", "--rounds", "1", *overrides], check=True, timeout=240)
    result = json.loads(out.read_text())
    assert [row["setting"] for row in result["rows"]] == ["kept", "streamed"]
    assert all(row["ratio"] > 1 and 0 <= row["input_stall"] < 1 for row in result["rows"])
