"""`genatt submit` on a live cluster of two nodes: raw log on S3 → shards → two ranks → evaluation → report; the same
when workers, or the head node, are killed.

The kills of `exhaustive` leave their figures in KILL_RESULTS=FILE.
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fault_results import figures, surroundings
from live_jobs import JOB_SECONDS, LAST_STEP, PIPELINE, UNDISTURBED, Live, resumed_from

pytestmark = [pytest.mark.ray, pytest.mark.s3, pytest.mark.slow, pytest.mark.timeout(1200)]

TOLERANCE = 1e-6
WORKER = "RayTrainWorker"
KILLS = 10
EVERY = PIPELINE["train"]["training"]["checkpoint_every"]
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


def killed(live: Live, run: str, seed: int, row: dict[str, Any]) -> None:
    """Submits the pipeline and kills one of its two ranks at a random moment; `row` gets what there is to know of it.

    The log has a line for each checkpoint, just before it is written, so the kill comes a random part of the time
    between two of them after a random line. By the third line the first checkpoint is complete.
    """
    draw = random.Random(seed)
    step = draw.randrange(3 * EVERY, LAST_STEP - 3 * EVERY, EVERY)
    steps, seconds = draw.random() * EVERY, live.seconds_a_step(UNDISTURBED)
    row |= {"seed": seed, "aimed_at_step": round(step + steps, 2)}
    with live.submitting(run) as process:
        live.wait_for_step(run, EVERY, process)
        victims = live.cluster.workers(WORKER)  # now: to look takes as long as some steps
        assert len(victims) == 2
        victim = draw.choice(victims)
        live.wait_for_step(run, step, process)
        time.sleep(steps * seconds)
        victim.send_signal(signal.SIGKILL)
        row["last_step_heard_of"] = live.done(run)
        said, _ = process.communicate(timeout=JOB_SECONDS)
    row["resumed_from"] = resumed_from(said)
    assert process.returncode == 0, said
    assert " lost: starting again (1 of 3)" in said, said
    (begun,) = row["resumed_from"]
    assert 0 < begun <= row["last_step_heard_of"], said


@pytest.mark.parametrize("seed", range(3))
def test_a_killed_worker_changes_no_loss(live: Live, largest_difference: Callable[[str], float], seed: int) -> None:
    killed(live, f"killed-{seed}", seed, {})
    assert largest_difference(f"killed-{seed}") <= TOLERANCE


@pytest.fixture(scope="module")
def results() -> Iterator[list[dict[str, Any]]]:
    """Rows of the ten kills, which KILL_RESULTS asks to keep."""
    rows: list[dict[str, Any]] = []
    yield rows
    if path := os.environ.get("KILL_RESULTS"):
        told = {
            "command": "pytest -m exhaustive tests/jobs/test_live_jobs.py -k ten_killed",
            **surroundings(),
            "device": "cpu",
            "nodes": 2,
            "ranks": 2,
            "steps": LAST_STEP,
            "tolerance": TOLERANCE,
            "config": PIPELINE,
            "kills": len(rows),
            "rows": rows,
        }
        Path(path).write_text(json.dumps(told, indent=1) + "\n")


@pytest.mark.exhaustive
@pytest.mark.parametrize("seed", range(100, 100 + KILLS))
def test_ten_killed_workers_change_no_loss(
    live: Live, largest_difference: Callable[[str], float], results: list[dict[str, Any]], seed: int
) -> None:
    row: dict[str, Any] = {"status": "failed"}
    results.append(row)
    killed(live, f"ten-{seed}", seed, row)
    row["largest_loss_difference"] = largest_difference(f"ten-{seed}")
    assert row["largest_loss_difference"] <= TOLERANCE
    row["status"] = "ok"


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
    checkpoint = json.loads(live.read("stopped", "stopped.json"))["checkpoint"]
    assert checkpoint >= 10
    ended = live.genatt(*live.submission("stopped"))
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "prepare: skipped: " in ended.stdout
    assert resumed_from(ended.stdout) == [checkpoint]
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
    """FAULT_RESULTS=FILE keeps its figures."""
    with figures("head_killed") as found:
        with live.submitting("headless") as process:
            live.wait_for_step("headless", 30, process)
            found["logged_step"] = live.step("headless")
            live.cluster.kill_head()
            process.kill()  # told after 90 s that the cluster does not answer
        live.cluster.stop()
        live.cluster.start()
        submitted = time.monotonic()
        ended = live.genatt(*live.submission("headless"))
        found["seconds_of_the_resubmission"] = round(time.monotonic() - submitted, 1)
        found["resumed_from"] = resumed_from(ended.stdout)
        assert ended.returncode == 0, ended.stdout + ended.stderr
        assert "prepare: skipped: " in ended.stdout
        (step,) = found["resumed_from"]
        assert 0 < step <= LAST_STEP
        found |= {"steps": LAST_STEP, "tolerance": TOLERANCE, "config": PIPELINE}
        found["largest_loss_difference"] = largest_difference("headless")
        assert found["largest_loss_difference"] <= TOLERANCE
