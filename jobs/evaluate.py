"""Job `evaluate`: rank the targets of splits with a run's best checkpoint, on a node of the cluster.

`python -m jobs.evaluate [job.yaml]`
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data_pipeline.errors import GenattError
from data_pipeline.format import manifest_hash
from data_pipeline.redaction import redact
from data_pipeline.storage import check_access, write_bytes
from genatt_dist import run_storage, runs
from jobs import driver, options
from jobs.node import on_node
from jobs.options import EvaluateStage


@contextmanager
def local(run: str) -> Iterator[Path]:
    """The run's small files in a local directory: its own, or a copy of what lies at its URL. Raises GenattError."""
    check_access(run)
    if not run_storage.is_url(run):
        runs.read_config(Path(run))
        yield Path(run)
        return
    with tempfile.TemporaryDirectory(prefix="genatt-run-") as directory:
        # The last name of the URL, for a report may call the run by it.
        copy = Path(directory) / run.rstrip("/").rpartition("/")[2]
        run_storage.fetch(run, copy)
        if not (copy / runs.CONFIG).exists():
            raise GenattError(f"{redact(run)} is not a run directory (no {runs.CONFIG} in it): train it first")
        yield copy


def evaluate(stage: EvaluateStage, run: str) -> str:
    """Evaluate every split on a node, and return a line about them."""
    return _told([on_node("evaluate", stage, _evaluate, run, split, stage) for split in stage.splits])


def already(stage: EvaluateStage, run: str) -> str | None:
    """A line about the evaluations where all are there, of the run's best checkpoint and of the data as they are."""
    from genatt_dist.training.checkpoint.store import Store

    with local(run) as directory:
        if not (kept := [json.loads(path.read_text()) for path in directory.glob("evaluation-*.json")]):
            return None
        config = runs.read_config(directory)
        best = Store.of(directory, config.training.checkpoint).best().progress.step
        current = _identity(best, manifest_hash(config.data.path), stage)
    found = {one["split"]: one for one in kept if _of(one) == current}
    return _told([found[split] for split in stage.splits]) if found.keys() >= set(stage.splits) else None


def _identity(step: int, data: str, stage: EvaluateStage) -> tuple[Any, ...]:
    """What evaluations with the same numbers have in common, but their split."""
    chosen = ", ".join(f"category={category}" for category in sorted(set(stage.categories)))
    return step, data, sorted(stage.inference), chosen


def _of(report: dict[str, Any]) -> tuple[Any, ...]:
    """`_identity` of an evaluation that was kept."""
    chosen = report["protocol"].get("only", "")
    return report["step"], report["dataset"]["manifest_hash"], sorted(report["inference"]), chosen


def _evaluate(run: str, split: str, stage: EvaluateStage) -> dict[str, Any]:
    """In a task: the report; what was written goes to the run."""
    from genatt_dist.evaluation.run import evaluate_run

    with local(run) as directory:
        before = {path: path.stat().st_mtime_ns for path in directory.iterdir()}
        report = evaluate_run(directory, split, inference=stage.inference, only=stage.categories)
        if run_storage.is_url(run):
            for path in directory.iterdir():
                if path.is_file() and before.get(path) != path.stat().st_mtime_ns:
                    write_bytes(f"{run}/{path.name}", path.read_bytes())
    return report


def _told(reports: list[dict[str, Any]]) -> str:
    told = (f"{one['split']} ndcg@10 {one['metrics']['ndcg@10']:.4f} of {one['users']:,} users" for one in reports)
    return ", ".join(told)


def work(config: dict[str, Any], run: str) -> None:
    """The job."""
    stage = options.of_evaluate(config)
    driver.stage("evaluate", lambda: already(stage, run), lambda: evaluate(stage, run))


if __name__ == "__main__":
    driver.main(work, __doc__ or "")
