"""One arm of a study from wherever it stands to its test metrics: `python -m genatt_dist.study.arm OUT ARM`.

The queue starts it as a process of its own. Every step is skipped when its result is there, so that an arm stopped at
any point goes on from its newest checkpoint and ends as it would have ended undisturbed.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from data_pipeline.errors import GenattError
from genatt_dist import runs
from genatt_dist.config import RunConfig
from genatt_dist.study import plan
from genatt_dist.study.paths import PLAN, SPLIT, finished, inferences_left, refuse_foreign, run_of

USER_ERROR = 2


def main() -> None:
    """Work on the arm that the arguments name; a mistake of the user is one line and exit code 2."""
    out, name = Path(sys.argv[1]), sys.argv[2]
    try:
        work(plan.load(out / PLAN), out, name)
    except GenattError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(USER_ERROR)


def work(study: plan.Study, out: Path, name: str) -> None:
    """Train the arm (its noise matched first, where it asks for that) and evaluate it on the test split, once."""
    run = run_of(out, name)
    if study.arms[name].match_noise is None:
        complete(study.config(name), run)
    elif not run.exists():
        from genatt_dist.study.calibrate import match

        match(study, out, name, complete).rename(run)
    if inferences_left(run, study.arms[name].also_infer):
        from genatt_dist.study.inference import evaluate_also

        evaluate_also(study.arms[name], run)
    if not finished(out, name):
        from genatt_dist.evaluation.run import evaluate_run

        evaluate_run(run, SPLIT)  # last: this is what finishes an arm


def complete(config: RunConfig, run: Path) -> None:
    """Train `run` to its end: from its newest checkpoint where it has one, else from the start."""
    if (run / runs.SUMMARY).exists():
        return
    resume = any(path.parent.suffix != ".tmp" for path in run.glob("checkpoints/step-*/COMPLETE"))
    refuse_foreign(run)
    if run.exists() and not resume:
        shutil.rmtree(run)  # stopped before its first checkpoint: nothing to go on from
    runs.train(config, run, resume=resume)


if __name__ == "__main__":
    main()
