"""What a preparation shows while it runs and at its end."""

import pytest

from data_pipeline import progress
from data_pipeline.format import LedgerEntry
from data_pipeline.memory import MemoryUse, ProcessPeak
from data_pipeline.progress import Stages, Usage, usage_lines

MEMORY = MemoryUse(
    measure="PSS",
    peak=1_500_000_000,
    roles={"worker": 1_000_000_000, "driver": 700_000_000},
    processes=(ProcessPeak(1, "worker", 1_000_000_000), ProcessPeak(2, "driver", 700_000_000)),
    line=((0.0, 700_000_000), (1.0, 1_500_000_000)),
    samples=2,
    seconds=1.0,
    sampler_share=0.01,
)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that pass only when told."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    return now


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")


def run(stages: Stages, clock: list[float]) -> None:
    with stages:
        with stages.stage("read", steps=4) as read:
            for _ in range(4):
                clock[0] += 10
                read.advance(1000, bytes=5_000_000)
        with stages.stage("k-core", rows_in=4000) as core:
            clock[0] += 1
            core.note("round 1: 3,900 rows left")
            core.advance(3900)


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip()[1:-1].split("│")]


def test_one_line_a_stage_where_there_is_no_terminal(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    run(Stages(True), clock)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "read       3,000 rows, 100 rows/s, 500.0 kB/s, 30 s, step 3 of 4, ETA 10 s",
        "read       4,000 rows, 100 rows/s, 500.0 kB/s, 40.0 s",
        "k-core     round 1: 3,900 rows left",
        "k-core     3,900 rows, 3,900 rows/s, 1.0 s",
    ]


def test_a_terminal_has_bars_with_rates_notes_and_time_left(
    clock: list[float], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, wide: None
) -> None:
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    stages = Stages(True)
    with stages, stages.stage("read", steps=4) as read:
        clock[0] += 2
        read.advance(1000, bytes=5_000_000)
        read.note("half of [it]")
        stages.progress.refresh()
        shown = capsys.readouterr().err
    assert "1,000 rows" in shown
    assert "500 rows/s" in shown
    assert "2.5 MB/s" in shown
    assert "ETA" in shown
    assert "half of [it]" in shown


def test_a_disabled_one_is_silent(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    stages = Stages(False)
    run(stages, clock)
    stages.usage = Usage(memory=MEMORY)
    stages.summary("title")
    assert capsys.readouterr() == ("", "")


def test_an_error_before_any_stage_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(KeyboardInterrupt), Stages(True):
        raise KeyboardInterrupt
    assert capsys.readouterr() == ("", "")


def test_the_table_joins_stages_and_ledger(clock: list[float], capsys: pytest.CaptureFixture[str], wide: None) -> None:
    stages = Stages(True)
    run(stages, clock)
    capsys.readouterr()
    ledger = [
        LedgerEntry(stage="clean", rows_in=4100, rows_out=4000, dropped={"outside_time_range": 100, "null": 0}),
        LedgerEntry(stage="k-core", rows_in=4000, rows_out=3900, dropped={"user_too_short": 70, "item_too_rare": 30}),
        LedgerEntry(stage="write", rows_in=3900, rows_out=5000, added=1100),
    ]
    stages.usage = Usage(ray_seconds=6.25, spilled_bytes=2_000_000, memory=MEMORY)
    stages.summary("mine: 3 users", ledger)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].strip() == "mine: 3 users"
    assert [cells(line) for line in lines if line.startswith("│")] == [
        ["read", "4,000", "4,000", "", "40.00", "100", "0.5"],
        ["clean", "4,100", "4,000", "100 outside_time_range", "", "", ""],
        ["k-core", "4,000", "3,900", "70 user_too_short, 30 item_too_rare", "1.00", "3,900", ""],
        ["write", "3,900", "5,000", "+1,100 of the parent", "", "", ""],
    ]
    assert lines[-2:] == [
        "Ray ready after 6.2 s (not in the table); spilled to disk: 2.0 MB",
        "Peak memory (PSS of 2 processes): 1.5 GB; by role: worker 1.0 GB, driver 700.0 MB",
    ]


def test_what_is_not_known_is_not_zero() -> None:
    assert usage_lines(Usage()) == ["Ray ran already; spilled to disk: unknown (Ray was not started by this run)"]
    assert usage_lines(Usage(memory=MEMORY))[1].startswith(
        "Peak memory (PSS of 2 processes, without those of that Ray)"
    )
    assert usage_lines(Usage(spilled_bytes=0)) == ["Ray ran already; spilled to disk: 0 bytes"]


def test_a_stage_keeps_what_callers_read(clock: list[float]) -> None:
    stages = Stages(False)
    with stages.stage("write", rows_in=10, steps=2) as stage:
        clock[0] += 4
        stage.advance(3)
        stage.advance(4)
        assert stage.rows_out == 7
    assert (stage.rows_in, stage.rows_out, stage.seconds, stage.rate) == (10, 7, 4.0, 1.75)
    assert stages.done == [stage]
    with stages.stage("read") as first:
        first.advance(5)
    assert first.rows_in == 5
