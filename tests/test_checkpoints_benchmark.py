"""The benchmark of checkpoints runs from end to end on two ranks, and its medians are of the slower rank."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.checkpoints import MODES, RANKS, summary

ROOT = Path(__file__).parents[1]


def block(mode: str, stall: float, whole: float, *steps: float) -> dict[str, object]:
    return {"mode": mode, "stall": stall, "block": whole, "steps": list(steps)}


def test_medians_are_of_the_slower_rank_and_the_excess_is_over_nothing_saved() -> None:
    first = [block("none", 0, 2, 0.1), block("foreground", 1, 4, 0.1), block("background", 0.2, 3, 0.3)]
    second = [block("none", 0, 1, 0.2), block("foreground", 2, 5, 0.1), block("background", 0.1, 2, 0.1)]
    found = summary([{"blocks": first * 3}, {"blocks": second * 3}])
    assert [found[mode]["stall_seconds"] for mode in MODES] == [0, 2, 0.2]
    assert [found[mode]["excess_seconds"] for mode in MODES] == [0, 3, 1]
    assert [found[mode]["step_seconds"] for mode in MODES] == [0.2, 0.1, 0.3]


@pytest.mark.slow
@pytest.mark.distributed
def test_it_measures_every_mode_on_all_ranks(tmp_path: Path) -> None:
    out = tmp_path / "checkpoints.json"
    command = [sys.executable, "-m", "benchmarks.checkpoints", "--rows", "3000", "--steps", "2", "--rounds", "1"]
    done = subprocess.run(
        [*command, "--out", str(out)], cwd=ROOT, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert str(ROOT) not in out.read_text()
    assert len(result["held_bytes"]) == RANKS
    assert sum(result["held_bytes"]) == 3001 * (64 + 1) * 4  # rows and a number of row-wise Adagrad for each
    assert list(result["summary"]) == list(MODES)
    assert result["summary"]["none"]["stall_seconds"] == 0
    assert all(result["summary"][mode]["stall_seconds"] > 0 for mode in MODES[1:])
    assert [len(one["blocks"][0]["steps"]) for one in result["ranks"]] == [2] * RANKS
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
