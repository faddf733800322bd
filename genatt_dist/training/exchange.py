"""How long an update stands still for other ranks: inside torch.distributed's calls, and waiting for those that run.

Some updates are watched. While one is, torch.distributed's own functions are replaced by timed ones, whoever calls them
(DeepSpeed, TorchRec, this package): torch tells how long gloo was at work, but not how long its caller waited. On a CPU
that is the host's clock, waiting for a slower rank included; on a GPU events in the stream, so that an exchange that
runs beside the computation costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from genatt_dist.training.timing import SectionTimer

_CALLS = (
    "all_gather",
    "all_gather_into_tensor",
    "all_reduce",
    "all_to_all",
    "all_to_all_single",
    "barrier",
    "broadcast",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_tensor",
)


class ExchangeTimer:
    """Seconds of the watched updates, and of what they stood still for."""

    def __init__(self, device: torch.device) -> None:
        self._timer = SectionTimer(device, ("update", "exchange"))
        self._inside = False

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Around an update."""
        owners = [*((dist, name) for name in _CALLS), (dist.Work, "wait")]
        before = [(owner, name, getattr(owner, name)) for owner, name in owners]
        try:
            for owner, name, function in before:
                setattr(owner, name, self._timed(function))
            with self._timer["update"]:
                yield
        finally:
            for owner, name, function in before:
                setattr(owner, name, function)

    def take(self) -> tuple[float, float]:
        """Seconds of the updates watched since the last call, and of their exchange. On a GPU the host waits here."""
        seconds = self._timer.take()
        return seconds["update"], seconds["exchange"]

    def _timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            if self._inside:  # a call that waits for its own work
                return function(*args, **kwargs)
            self._inside = True
            try:
                with self._timer["exchange"]:
                    return function(*args, **kwargs)
            finally:
                self._inside = False

        return run
