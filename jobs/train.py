"""Job `train`: a run under Ray Train; it goes on from the newest complete checkpoint of its run directory, if any.

`python -m jobs.train [job.yaml]`
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import yaml

from data_pipeline.redaction import redact
from data_pipeline.storage import check_access
from genatt_dist import config as configuration
from genatt_dist import run_storage, runs
from genatt_dist.config import RunConfig
from genatt_dist.training.checkpoint.files import read_if_there
from genatt_dist.training.checkpoint.store import Store
from jobs import driver


def train(config: RunConfig, run: str) -> str:
    """Train to the end, and return a line about it. Raises GenattError; ResumableError where it was stopped."""
    from genatt_dist.launch.ray_train import fit

    if not run_storage.is_url(run):
        begin(config, Path(run))
        return _told(fit(config, Path(run), None, None))
    with tempfile.TemporaryDirectory(prefix="genatt-run-") as directory:
        copy = Path(directory) / run.rpartition("/")[2]
        run_storage.fetch(run, copy)
        begin(run_storage.stored_at(config, run), copy)
        return _told(fit(config, copy, None, run))


def begin(config: RunConfig, run: Path) -> None:
    """Write a run directory's configuration. Raises GenattError where it has checkpoints of another one."""
    if (run / runs.CONFIG).exists() and Store.of(run, runs.read_config(run).training.checkpoint).complete():
        runs.check_same(config, run)
    runs.create(config, run)


def already(config: RunConfig, run: str) -> str | None:
    """A line about the run where one of this configuration was trained to its end.

    Any other goes on, or is refused, when training is asked to resume it.
    """
    check_access(run)
    summary = read_if_there(f"{run}/{runs.SUMMARY}")
    if summary is None or (before := read_if_there(f"{run}/{runs.CONFIG}")) is None:
        return None
    theirs = configuration.parse(yaml.safe_load(before), f"{redact(run)}/{runs.CONFIG}")
    ours = run_storage.stored_at(config, run) if run_storage.is_url(run) else config
    return _told(json.loads(summary)) if ours == theirs else None


def _told(summary: dict[str, Any]) -> str:
    training = summary["train"]
    return (
        f"valid ndcg@10 {summary['valid']['ndcg@10']:.4f} after {training['epochs']} epochs, "
        f"{training['sequences_per_second']:,.0f} sequences/s on {training['world_size']} ranks"
    )


def work(config: dict[str, Any], run: str) -> None:
    """The job."""
    wanted = configuration.parse(config, "of the job")
    driver.stage("train", lambda: already(wanted, run), lambda: train(wanted, run))


if __name__ == "__main__":
    driver.main(work, __doc__ or "")
