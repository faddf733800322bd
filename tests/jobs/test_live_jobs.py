"""`genatt submit` on a live cluster of two nodes: raw log on S3 → shards → two ranks → evaluation → report; the same
when workers, or the head node, are killed.

The kills of `exhaustive` leave their figures in KILL_RESULTS=FILE.
"""

from __future__ import annotations

import json
import os
import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from live_jobs import JOB_SECONDS, LAST_STEP, UNDISTURBED, Live

pytestmark = [pytest.mark.ray, pytest.mark.s3, pytest.mark.slow, pytest.mark.timeout(1200)]

TOLERANCE = 1e-6
WORKER = "RayTrainWorker"
KILLS = 10
_FIRST, _LAST = 5, LAST_STEP - 20  # steps after which a worker is killed: after some of training, and with some left
Losses = dict[int, tuple[float, float]]


def test_pipeline_goes_from_a_raw_log_to_a_report(live: Live, undisturbed: tuple[str, Losses]) -> None:
    said, _ = undisturbed
    for stage in ("prepare", "train", "evaluate", "report"):
        assert f"{stage}: starts" in said
        assert f"{stage}: done in " in said
    assert "on 2 ranks" in said
    assert json.loads(live.read(UNDISTURBED, "evaluation-test.json"))["users"] == 943
    assert "plotly" in live.read(UNDISTURBED, "report/report.html")


def test_finished_stages_are_skipped_and_jobs_are_listed(live: Live, undisturbed: tuple[str, Losses]) -> None:
    ended = live.genatt(*live.submission(UNDISTURBED))
    assert ended.returncode == 0, ended.stdout + ended.stderr
    for stage in ("prepare", "train", "evaluate", "report"):
        assert f"{stage}: skipped: " in ended.stdout
    listed = json.loads(live.genatt("jobs", "list", "--json").stdout)
    attempts = [job for job in listed if job["run"] == live.url(UNDISTURBED)]
    assert [job["status"] for job in attempts] == ["SUCCEEDED", "SUCCEEDED"]
    assert [job["id"][-2:] for job in attempts] == ["-2", "-1"]
    assert not any(value in json.dumps(listed) for value in ("AWS", live.cluster.access["RAY_AUTH_TOKEN"]))
    assert live.genatt("jobs", "logs", attempts[0]["id"]).stdout.endswith(ended.stdout)


def killed(live: Live, run: str, seed: int) -> dict[str, Any]:
    """Submits the pipeline and kills one of its two ranks after a random step."""
    draw = random.Random(seed)
    step = draw.randint(_FIRST, _LAST)
    with live.submitting(run) as process:
        live.wait_for_step(run, step, process)
        victims = live.cluster.workers(WORKER)
        assert len(victims) == 2
        victim = draw.choice(victims)
        victim.send_signal(signal.SIGKILL)
        found = live.step(run)
        said, _ = process.communicate(timeout=JOB_SECONDS)
    assert process.returncode == 0, said
    assert " lost: starting again (1 of 3)" in said, said
    return {"seed": seed, "killed_after_step": found}


@pytest.mark.parametrize("seed", range(3))
def test_a_killed_worker_changes_no_loss(live: Live, largest_difference: Callable[[str], float], seed: int) -> None:
    killed(live, f"killed-{seed}", seed)
    assert largest_difference(f"killed-{seed}") <= TOLERANCE


@pytest.fixture(scope="module")
def results() -> Iterator[list[dict[str, Any]]]:
    """Rows of the ten kills, which KILL_RESULTS asks to keep."""
    rows: list[dict[str, Any]] = []
    yield rows
    if path := os.environ.get("KILL_RESULTS"):
        command = "pytest -m exhaustive tests/jobs/test_live_jobs.py -k ten_killed"
        told = {
            "command": command,
            "nodes": 2,
            "ranks": 2,
            "steps": LAST_STEP,
            "tolerance": TOLERANCE,
            "kills": len(rows),
            "rows": rows,
        }
        Path(path).write_text(json.dumps(told, indent=1) + "\n")


@pytest.mark.exhaustive
@pytest.mark.parametrize("seed", range(100, 100 + KILLS))
def test_ten_killed_workers_change_no_loss(
    live: Live, largest_difference: Callable[[str], float], results: list[dict[str, Any]], seed: int
) -> None:
    row = killed(live, f"ten-{seed}", seed)
    found = largest_difference(f"ten-{seed}")
    results.append(row | {"largest_loss_difference": found})
    assert found <= TOLERANCE


@pytest.mark.exhaustive
def test_a_second_submission_follows_the_job_and_a_stopped_one_goes_on(
    live: Live, largest_difference: Callable[[str], float]
) -> None:
    with live.submitting("stopped") as process:
        job = live.job("stopped", process)
        again = live.genatt(*live.submission("stopped"), "--timeout", 1)
        assert again.returncode == 130
        assert "is at work on this run already: following it" in again.stderr
        assert "goes on. Follow it: genatt jobs logs" in again.stderr
        other = live.genatt("submit", "evaluate", "--run", live.url("stopped"))
        assert other.returncode == 2
        assert "has job genatt-pipeline-stopped-" in other.stderr
        live.wait_for_step("stopped", 10, process)
        stopped = live.genatt("jobs", "stop", job, "--wait")
        assert stopped.stdout == f"{job}: STOPPED\n", stopped.stderr
        said, _ = process.communicate(timeout=JOB_SECONDS)
        assert process.returncode == 75, said
        assert "was stopped and can go on: genatt submit pipeline" in said
    assert json.loads(live.read("stopped", "stopped.json"))["checkpoint"] >= 10
    ended = live.genatt(*live.submission("stopped"))
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "prepare: skipped: " in ended.stdout
    assert largest_difference("stopped") <= TOLERANCE


@pytest.mark.exhaustive
def test_a_benchmark_has_its_ranks_on_both_nodes(live: Live) -> None:
    """A node has one CPU, and a rank takes one. BENCHMARK_RESULTS=FILE keeps the rows."""
    ended = live.genatt("submit", "benchmark", "configs/benchmark.yaml", "--run", live.url("scaling"), *live.passed)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert f"{live.url('scaling')} has scaling.json, scaling_breakdown.png" in ended.stdout
    text = live.read("scaling", "scaling.json")
    if path := os.environ.get("BENCHMARK_RESULTS"):
        Path(path).write_text(text)
    result = json.loads(text)
    assert {row["ranks"] for row in result["rows"]} == {1, 2}
    assert {row["status"] for row in result["rows"]} == {"ok"}


@pytest.mark.exhaustive
def test_after_the_heads_death_a_resubmission_resumes(live: Live, largest_difference: Callable[[str], float]) -> None:
    with live.submitting("headless") as process:
        live.wait_for_step("headless", 30, process)
        live.cluster.kill_head()
        process.kill()  # told after 90 s that the cluster does not answer
    live.cluster.stop()
    live.cluster.start()
    ended = live.genatt(*live.submission("headless"))
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "prepare: skipped: " in ended.stdout
    assert largest_difference("headless") <= TOLERANCE
