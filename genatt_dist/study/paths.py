"""Where the parts of a study lie in its directory, and how its small JSON files are written and read."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from data_pipeline.errors import GenattError
from genatt_dist import runs

PLAN = "plan.yaml"
STUDY = "study.json"
OTHER_INFERENCE = "other-inference.json"
SPLIT = "test"
_ROUNDS, _LOGS = "rounds", "logs"
RESERVED = (_ROUNDS, _LOGS)


def run_of(out: Path, arm: str) -> Path:
    """The arm's run directory."""
    return out / arm


def round_of(out: Path, arm: str, number: int) -> Path:
    """The run directory of one training of an arm whose noise is being matched; the one kept becomes `run_of`."""
    return out / _ROUNDS / f"{arm}-{number}"


def calibration_of(out: Path, arm: str) -> Path:
    """What was tried to match an arm's noise."""
    return out / _ROUNDS / f"{arm}.json"


def log_of(out: Path, arm: str) -> Path:
    """What an arm's processes print."""
    return out / _LOGS / f"{arm}.log"


def finished(out: Path, arm: str) -> bool:
    """Whether the arm is trained to its end, and what is evaluated is the best that it came to."""
    run = run_of(out, arm)
    evaluation = read_json(run / f"evaluation-{SPLIT}.json")
    if evaluation is None or read_json(run / runs.SUMMARY) is None:
        return False
    return best_step(run) in (None, evaluation.get("step"))  # None: checkpoints were cleared away, the results stay


def best_step(run: Path) -> int | None:
    """The step of the run's best checkpoint, as its newest one says (training.checkpoint, which needs torch)."""
    sealed = sorted(path.parent for path in run.glob("checkpoints/step-*/COMPLETE") if not path.parent.suffix)
    progress = read_json(sealed[-1] / "progress.json") if sealed else None
    if progress is None:
        return None
    best: int | None = progress.get("best_step", -1)
    return progress.get("step") if best == -1 else best


def is_foreign(run: Path) -> bool:
    """Whether something lies at `run` that is no run's directory, not even one whose creation was stopped."""
    if not run.exists() or (run / runs.CONFIG).exists():
        return False
    return not run.is_dir() or any(path.name != f".{runs.CONFIG}" for path in run.iterdir())


def refuse_foreign(run: Path) -> None:
    """Raises GenattError where a run would take the place of what the study did not make."""
    if is_foreign(run):
        raise GenattError(
            f"{run} is no run of this study (no {runs.CONFIG} in it): move it away, or choose another --out"
        )


def inferences_left(run: Path, asked: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Of other inferences (name → changes of model.attention), those that the run was not evaluated under yet."""
    done = read_json(run / OTHER_INFERENCE) or {}
    return {name: attention for name, attention in asked.items() if done.get(name, {}).get("attention") != attention}


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in the file; None where there is no file, or only part of one."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write the whole file or none of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(value, indent=2) + "\n")
    temporary.rename(path)
