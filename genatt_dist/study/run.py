"""`genatt study quality`: from a study's file to its results, through the queue."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from data_pipeline.errors import GenattError
from genatt_dist.study import plan, queue, results
from genatt_dist.study.live import View


def quality(
    path: Path,
    out: Path,
    arms: Sequence[str],
    overrides: Sequence[str],
    jobs: int,
    copy_to: Path | None,
    console: Console,
) -> None:
    """Bring the arms (default: all) of the study in `path` to their results in `out`; print and keep them.

    jobs: arms trained at one time; each has its part of the cores. copy_to: where study.json is copied.
    Raises GenattError for what can be known before, and at the end when an arm failed, naming it.
    """
    if jobs < 1:
        raise GenattError(f"--jobs {jobs}: at least one arm must run")
    study = plan.load(path, overrides)
    names = list(dict.fromkeys(arms or study.arms))
    queue.check(study, out, names)
    if copy_to:
        results.check_target(copy_to)
    with View(out, console) as view:
        ended = queue.run(study, out, names, jobs, view)
    failures = {job.name: job.error for job in ended if job.error}
    report = results.write(study, out, failures, _command(path, out, arms, overrides, jobs))
    results.print_results(report, Console())
    if copy_to:
        results.copy(out, copy_to)
    console.print(f"{out / 'study.json'}, {out / 'report.html'}", highlight=False, soft_wrap=True)
    if failures:
        raise GenattError(
            f"{len(failures)} of {len(names)} arms failed: "
            + "; ".join(f"{name}: {error} (log: {out / 'logs' / name}.log)" for name, error in failures.items())
        )


def _command(path: Path, out: Path, arms: Sequence[str], overrides: Sequence[str], jobs: int) -> str:
    """How the study was started, with no more of this machine's paths than was relative to where it was started."""
    words = ["genatt", "study", "quality", "--config", _portable(path), "--out", _portable(out), "--jobs", str(jobs)]
    words += ["--arms", ",".join(arms)] if arms else []
    return shlex.join([*words, *(word for word in overrides if not word.partition("=")[2].startswith("/"))])


def _portable(path: Path) -> str:
    return path.name if path.is_absolute() else str(path)
