"""Real arms of a study: one that was killed ends as an undisturbed one, and the results say what the runs say."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import polars as pl
import psutil
import pytest
import yaml
from rich.console import Console
from tiny_data import run_tree

from data_pipeline.errors import GenattError
from genatt_dist.evaluation.statistics import holm
from genatt_dist.study import queue
from genatt_dist.study.plan import Study
from genatt_dist.study.run import quality

pytestmark = pytest.mark.slow


def _tree(prepared: Path, **training: Any) -> dict[str, Any]:
    base = run_tree(prepared)
    base["training"] |= training
    return base


@pytest.mark.exhaustive
def test_killed_arm_ends_as_an_undisturbed_one(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queue, "_POLL_SECONDS", 0.02)  # training takes seconds: the kill must come in the midst of it
    base = _tree(prepared, epochs=100, patience=100)
    arms = {"killed": {}, "whole": {}}
    study = Study.model_validate({"base": base, "arms": arms, "comparisons": {"reference": "whole"}})

    def kill(jobs: Sequence[queue.Job]) -> None:
        process = jobs[0].process
        if process and list((tmp_path / "killed").glob("checkpoints/step-*/COMPLETE")):
            for worker in psutil.Process(process.pid).children() if process.poll() is None else ():
                worker.kill()

    (job,) = queue.run(study, tmp_path, ["killed"], 1, kill)
    assert job.state == "failed"
    assert "ended with exit code -9" in str(job.error)
    assert not (tmp_path / "killed" / "summary.json").exists()
    first = _steps(tmp_path / "killed")

    assert [job.state for job in queue.run(study, tmp_path, ["killed", "whole"], 2)] == ["done", "done"]
    assert 0 < len(first) < len(_steps(tmp_path / "killed")) == len(_steps(tmp_path / "whole"))
    assert _steps(tmp_path / "killed") == pytest.approx(_steps(tmp_path / "whole"), abs=1e-6)
    ranks = [pl.read_parquet(tmp_path / name / "ranks-test.parquet") for name in arms]
    assert ranks[0].equals(ranks[1])


def _steps(run: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if line["kind"] == "train"}


def test_study_from_file_to_results(prepared: Path, tmp_path: Path) -> None:
    """Three arms, one whose noise is matched, and one that cannot train."""
    arms = {
        "dot_product": {},
        "variational": {
            "overrides": {"model": {"attention": {"type": "variational"}}},
            "also_infer": {"sample": {"inference": "sample"}},
        },
        "noisy": {
            "overrides": {"model": {"attention": {"type": "noisy_dot_product"}}},
            "match_noise": {"weights": "dot_product", "target": "variational", "rounds": 1, "tolerance": 0.9},
        },
        "broken": {"overrides": {"training": {"learning_rate": 1e30}}},
    }
    tree = {
        "base": _tree(prepared, epochs=2),
        "arms": arms,
        "comparisons": {"reference": "dot_product", "claims": ["variational"], "resamples": 500},
    }
    path, out, copy = tmp_path / "study.yaml", tmp_path / "study", tmp_path / "results" / "copy.json"
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    with pytest.raises(GenattError, match=r"1 of 4 arms failed: broken: loss is nan .* \(log: .*broken.log\)"):
        quality(path, out, [], [], 2, copy, Console(stderr=True))

    report = json.loads(copy.read_text())
    assert report == json.loads((out / "study.json").read_text())
    assert str(tmp_path) not in copy.read_text()
    assert {name: arm["state"] for name, arm in report["arms"].items()} == {
        "dot_product": "done", "variational": "done", "noisy": "done", "broken": "failed",
    }  # fmt: skip
    for name in ("dot_product", "variational", "noisy"):
        evaluation = json.loads((out / name / "evaluation-test.json").read_text())
        assert report["arms"][name]["test"].items() <= evaluation["metrics"].items()
    assert report["arms"]["variational"]["test_under_other_inference"]["sample"]["metrics"]["mrr"] > 0
    matched = report["arms"]["noisy"]["matched_noise"]
    assert report["arms"]["noisy"]["attention"]["noise"] == matched["noise"]
    assert matched["rounds"][0]["before_training"] == pytest.approx(matched["target"], rel=1e-3)

    against_reference, claims = report["comparisons"]["families"]
    pairs = [(row["arm"], row["against"]) for row in claims["rows"] if row["metric"] == "mrr"]
    assert pairs == [("variational", "noisy")]  # the first family has it against the reference
    assert (against_reference["tests_a_metric"], claims["tests_a_metric"]) == (3, 2)
    for family in (against_reference, claims):
        for metric in report["comparisons"]["metrics"]:
            rows = [row for row in family["rows"] if row["metric"] == metric]
            missing = family["tests_a_metric"] - len(rows)  # of the arm that failed
            assert missing == 1
            assert not family["complete"]
            assert [row["p_holm"] for row in rows] == holm([*(row["p"] for row in rows), 1.0])[: len(rows)]
            for row in rows:
                values = [report["arms"][row[side]]["test"][metric] for side in ("arm", "against")]
                assert row["difference"] == pytest.approx(values[0] - values[1], abs=1e-12)
    assert (out / "report.html").exists()
