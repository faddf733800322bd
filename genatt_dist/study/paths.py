"""Where the parts of a study lie in its directory, and how its small JSON files are written and read."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

PLAN = "plan.yaml"
STUDY = "study.json"
OTHER_INFERENCE = "other-inference.json"
SPLIT = "test"


def run_of(out: Path, arm: str) -> Path:
    """The arm's run directory."""
    return out / arm


def round_of(out: Path, arm: str, number: int) -> Path:
    """The run directory of one training of an arm whose noise is being matched; the one kept becomes `run_of`."""
    return out / "rounds" / f"{arm}-{number}"


def calibration_of(out: Path, arm: str) -> Path:
    """What was tried to match an arm's noise."""
    return out / "rounds" / f"{arm}.json"


def log_of(out: Path, arm: str) -> Path:
    """What an arm's processes print."""
    return out / "logs" / f"{arm}.log"


def finished(out: Path, arm: str) -> bool:
    """Whether the arm is trained and evaluated."""
    return read_json(run_of(out, arm) / f"evaluation-{SPLIT}.json") is not None


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
