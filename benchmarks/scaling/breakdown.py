"""Where a step's time goes, from torch.profiler: every moment of the training thread is put into one part.

The sections of the product (`training/timing.py`) say what is under way; inside them a part is told by the operation:
waiting for other ranks is an exchange, fbgemm and embeddings are the lookup, and the loss is found in the backward pass
by the sequence numbers that autograd gives an operation and its gradient. Shares are of the profiled steps, which take
longer than others; `measure` multiplies them by the time of a step that is not watched. On a GPU they are shares of the
host's time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol
from unittest import mock

import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile, record_function

from genatt_dist.training import step as product
from genatt_dist.training.timing import SECTIONS

PARTS = (
    "input",
    "id exchange",
    "lookup",
    "dense forward",
    "dense backward",
    "softmax",
    "softmax exchange",
    "ZeRO communication",
    "sums over ranks",
    "optimizer",
    "other",
)
EXCHANGES = ("id exchange", "softmax exchange", "ZeRO communication", "sums over ranks")
_WAIT, _LOSS = "wait for ranks", "loss"
_EXCHANGED = ("c10d::", "gloo:", "nccl:", _WAIT)
_LOOKED_UP = ("fbgemm::", "aten::embedding", "aten::embedding_dense_backward")
_ROWS_BACK = ("All2All_Seq_bwd", "SequenceEmbeddings", "_Seq_All2All", "All2All_Seq_Req")


class Event(Protocol):
    """What is read of torch's FunctionEvent."""

    name: str
    cpu_parent: Event | None
    sequence_nr: int
    self_cpu_time_total: float
    thread: int


def profiled(steps: Callable[[int], object], count: int, trace: Path | None) -> dict[str, float]:
    """Share of each part in `count` steps; they add up to 1. trace: where chrome's trace of them goes."""
    with _named(), profile(activities=[ProfilerActivity.CPU]) as profiler:
        steps(count)
    if trace is not None:
        trace.parent.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(trace))
    return shares(list(profiler.events()))  # type: ignore[no-untyped-call]


def shares(events: Sequence[Any]) -> dict[str, float]:
    """The share of each part in the time of the sections' thread."""
    threads = {event.thread for event in events if event.name == "forward"}
    mine = [event for event in events if event.thread in threads]
    of_loss = {event.sequence_nr for event in mine if event.sequence_nr >= 0 and _LOSS in _path(event)}
    microseconds: Counter[str] = Counter()
    for event in mine:
        microseconds[part(_path(event), _sequence(event) in of_loss)] += max(0.0, event.self_cpu_time_total)
    return {name: microseconds[name] / max(microseconds.total(), 1e-9) for name in PARTS}


def part(path: Sequence[str], of_loss: bool) -> str:
    """The part of an operation. path: its name and those of what it ran in, innermost first. of_loss: whether autograd
    ran it for an operation of the loss.
    """
    section = next((name for name in path if name in SECTIONS), "")
    loss = of_loss or _LOSS in path or any(name.startswith("_FullLoss") for name in path)
    if path[0].startswith(_EXCHANGED):
        if loss:
            return "softmax exchange"
        if section == "lookup" or any(word in name for name in path for word in _ROWS_BACK):
            return "id exchange"
        return {"forward": "sums over ranks", "": "other"}.get(section, "ZeRO communication")
    if section in ("input", "optimizer"):
        return section
    if section == "lookup" or path[0].startswith(_LOOKED_UP):
        return "lookup"
    if loss:
        return "softmax"
    return {"forward": "dense forward", "backward": "dense backward"}.get(section, "other")


def _path(event: Event) -> list[str]:
    names, here = [], event
    while here is not None:
        names.append(here.name)
        here = here.cpu_parent  # type: ignore[assignment]
    return names


def _sequence(event: Event) -> int | None:
    """The number of the forward operation whose gradient this is part of."""
    here: Event | None = event
    while here is not None:
        if here.name.startswith("autograd::engine::evaluate_function"):
            return here.sequence_nr
        here = here.cpu_parent
    return None


@contextmanager
def _named() -> Iterator[None]:
    """Ranges around what the profiler has no name for: waiting for ranks, and the loss."""

    def ranged(function: Callable[..., Any], name: str) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            with record_function(name):
                return function(*args, **kwargs)

        return run

    with (
        mock.patch.object(dist.Work, "wait", ranged(dist.Work.wait, _WAIT)),
        mock.patch.object(product, "candidate_nll", ranged(product.candidate_nll, _LOSS)),
        mock.patch.object(product, "full_loss", ranged(product.full_loss, _LOSS)),
    ):
        yield
