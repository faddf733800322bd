"""Job `benchmark`: what was measured is in the run before the benchmark ends, and however it ends."""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path

import pytest

from data_pipeline.errors import GenattError
from jobs.benchmark import UNFINISHED, followed

_BENCHMARK = """
import sys, time
from pathlib import Path
directory, seen = map(Path, sys.argv[1:3])
(directory / ".rows.tmp").write_text("first")
(directory / ".rows.tmp").rename(directory / "rows.json")
deadline = time.monotonic() + 30
while not seen.exists() and time.monotonic() < deadline:
    time.sleep(0.01)
(directory / "rows.json").write_text("both")
(directory / "traces").mkdir()
(directory / "traces" / "a.json").write_text("trace")
print("said last", file=sys.stderr)
sys.exit(int(sys.argv[3]))
"""


def _follow(tmp_path: Path, code: int) -> tuple[list[str], str | None]:
    """Names of the files and the text of what the run held while the benchmark was under way."""
    directory, run, go_on, found = tmp_path / "node", tmp_path / "run", tmp_path / "seen", list[str]()
    directory.mkdir(exist_ok=True)
    before = set(run.glob(f"{UNFINISHED}/*/rows.json"))

    def look() -> None:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            for path in set(run.glob(f"{UNFINISHED}/*/rows.json")) - before:
                if text := path.read_text():
                    found.append(text)
                    go_on.touch()
                    return
            time.sleep(0.01)

    thread = threading.Thread(target=look)
    thread.start()
    command = [sys.executable, "-c", _BENCHMARK, str(directory), str(go_on), str(code)]
    try:
        names = followed("the benchmark", command, os.environ, directory, str(run), every=0.05)
    finally:
        thread.join()
        assert found == ["first"]
    return names, (run / "rows.json").read_text()


def test_rows_are_in_the_run_while_the_benchmark_measures_and_only_there_at_the_end(tmp_path: Path) -> None:
    assert _follow(tmp_path, 0) == (["rows.json", "traces/a.json"], "both")
    assert (tmp_path / "run" / "traces" / "a.json").read_text() == "trace"
    assert list((tmp_path / "run").rglob(f"{UNFINISHED}/*/*")) == []


def test_a_benchmark_that_fails_leaves_its_rows_and_those_of_another_attempt(tmp_path: Path) -> None:
    earlier = tmp_path / "run" / UNFINISHED / "20260101T000000.000000Z" / "rows.json"
    earlier.parent.mkdir(parents=True)
    earlier.write_text("of a node that was lost")
    said = r"the benchmark ended with exit code 3: said last: what it had written is in .*/unfinished/"
    with pytest.raises(GenattError, match=said):
        _follow(tmp_path, 3)
    held = [path.read_text() for path in sorted((tmp_path / "run").rglob("rows.json"))]
    assert held == ["of a node that was lost", "both"]
    assert not (tmp_path / "run" / "rows.json").exists()
