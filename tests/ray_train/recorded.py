"""What a run under way has recorded, and what is to happen then."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from genatt_dist.config import RunConfig


def losses(run: Path) -> dict[int, float]:
    """The last record of each step of a run, which may be under way."""
    log = run / "metrics.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines() if line.endswith("}")] if log.exists() else []
    return {line["step"]: line["loss"] + line["generative_loss"] for line in lines if line["kind"] == "train"}


@contextmanager
def once_at(run: Path, step: int, do: Callable[[], None]) -> Iterator[None]:
    """Meanwhile do something as soon as the run has a record of `step`."""
    done, end = [], threading.Event()

    def watch() -> None:
        while max(losses(run), default=0) < step and not end.wait(0.05):
            pass
        if not end.is_set():
            do()
            done.append(step)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join()
    assert done, f"the run ended before step {step}"


def train_rank(config: RunConfig, run: Path) -> None:
    """The training function in a process that no launcher started; here, because processes find it by its module."""
    from genatt_dist.training.train import train

    train(config, run, "torchrun")
