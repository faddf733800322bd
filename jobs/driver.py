"""How the entry point of a job begins, tells its stages, and ends.

It finds what it has to do in `job.yaml` in the job's working directory (`jobs.submit` put it there): the run, and the
resolved configuration. It ends as `genatt` does: a user's mistake is one line and exit code 2, work that was stopped
and can go on 75.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from data_pipeline.errors import GenattError, ResumableError

DOCUMENT = "job.yaml"


def main(work: Callable[[dict[str, Any], str], None], what: str) -> None:
    """Do `work(configuration, run)` as the document says."""
    parser = argparse.ArgumentParser(description=what)
    parser.add_argument("document", type=Path, nargs="?", default=Path(DOCUMENT), help="YAML: keys run and config")
    path = parser.parse_args().document
    # Both the job and what a stage asks of Ray set variables of the processes: the stage's count.
    os.environ["RAY_OVERRIDE_JOB_RUNTIME_ENV"] = "1"
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        config, run = read(path)
        work(config, run)
    except KeyboardInterrupt:
        _end(ResumableError("the job was stopped: submit it again and it goes on"))
    except GenattError as error:
        _end(error)


def read(path: Path) -> tuple[dict[str, Any], str]:
    """Configuration and run of a job's document. Raises GenattError."""
    try:
        tree = yaml.safe_load(path.read_text())
        return dict(tree["config"]), str(tree["run"])
    except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise GenattError(
            f"cannot read job document {path}: {reason}: `genatt submit` writes it (keys run and config)"
        ) from None


def stage(name: str, already: Callable[[], str | None], work: Callable[[], str]) -> None:
    """Do a stage unless its result is there; one line when it begins and one when it ends, each with what was found."""
    if (found := already()) is not None:
        say(f"{name}: skipped: {found}")
        return
    say(f"{name}: starts")
    began = time.perf_counter()
    result = work()
    say(f"{name}: done in {time.perf_counter() - began:.1f} s: {result}")


def say(line: str) -> None:
    """A line of the job's log."""
    print(line, flush=True)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt  # stages tidy up as after Ctrl-C; Ray knows no other exception of a handler


def _end(error: GenattError) -> None:
    print(f"error: {error}", file=sys.stderr, flush=True)
    sys.exit(error.exit_code)
