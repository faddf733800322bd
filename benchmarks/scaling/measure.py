"""The grid, measured cell by cell: all rows of a cell live at once and take turns, forth and back.

A turn is some steps after one that is not counted (it warms the caches that another row has used). A step of several
ranks takes as long as its slowest; of independent processes, the mean. A ratio is the median over rounds of the ratio
within a round, so that a machine that slows down for a while slows both.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.scaling.breakdown import EXCHANGES
from benchmarks.scaling.grid import Cell, ScalingConfig, Spec
from benchmarks.scaling.pool import Pool, Row, RowError

MIB = 1 << 20
_MEMORY_SHARE = 0.8  # of what is free
_PROFILED_STEPS = 3
WAITING = "waiting for the slower rank"


class Measured:
    """A row under way: its processes, and what they have told."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.status, self.note = "ok", ""
        self.row: Row | None = None
        self.machine: dict[str, Any] = {}
        self.rounds: list[float] = []
        self.steps: list[float] = []
        self.parts: list[dict[str, float]] = []
        self.peak_bytes: int | None = None
        self._count = 1

    def attempt(self, what: Callable[[Row], None]) -> None:
        """Do something with the processes; a failure is the row's status, and its end."""
        if self.row is None:
            return
        try:
            what(self.row)
        except RowError as error:
            self.row.end()
            self.status, self.note, self.row = error.status, error.note, None

    def make(self, row: Row, memory: int, config: ScalingConfig) -> None:
        """Build it, take its first steps, and see how many fill a turn."""
        made = row.ask("make", spec=self.spec.model_dump(), memory=memory)
        self.machine = {"device": made[0]["device"], "threads_a_rank": made[0]["threads"]}
        if made[0]["cores"]:
            self.machine["cores"] = [core for one in made for core in one["cores"]]
        seconds = self._seconds(row.ask("steps", count=config.warmup))
        self._count = max(1, int(config.turn_seconds / seconds[-1]))

    def turn(self, row: Row) -> None:
        answers = row.ask("steps", count=1 + self._count)
        seconds = self._seconds(answers)[1:]
        self.peak_bytes = max(answer["peak_bytes"] for answer in answers)
        self.rounds.append(statistics.median(seconds))
        self.steps += seconds

    def profile(self, row: Row, trace: Path | None) -> None:
        answers = row.ask("profile", count=_PROFILED_STEPS, trace=str(trace.absolute()) if trace else None)
        self.parts = [answer["parts"] for answer in answers]

    def _seconds(self, answers: Sequence[Mapping[str, Any]]) -> list[float]:
        together = zip(*(answer["seconds"] for answer in answers), strict=True)
        return [statistics.mean(step) if self.spec.independent else max(step) for step in together]


def measured_cell(
    pool: Pool, config: ScalingConfig, cell: Cell, trace: Path | None, tell: Callable[[Spec], None]
) -> list[dict[str, Any]]:
    """The rows of one cell. trace: a directory for chrome's traces. tell: is called when a row gets ready."""
    specs = config.rows(cell)
    share = int(pool.free_memory() * _MEMORY_SHARE / len(specs))
    memory = config.memory_mb * MIB if config.memory_mb else share
    found = [Measured(spec) for spec in specs]
    with ExitStack() as stack:
        for one in found:
            tell(one.spec)
            if note := too_large(one.spec, memory):
                one.status, one.note = "out_of_memory", note
                continue
            try:
                one.row = stack.enter_context(pool.row(one.spec))
            except RowError as error:
                one.status, one.note = error.status, error.note
            one.attempt(lambda row, one=one: one.make(row, memory, config))  # type: ignore[misc]
        for number in range(config.rounds):
            for one in found if number % 2 == 0 else reversed(found):
                one.attempt(one.turn)
        for one in found:
            if one.spec.independent or one.spec.batch < config.batch:
                continue
            place = trace / f"{_slug(one.spec)}.json" if trace else None
            one.attempt(lambda row, one=one, place=place: one.profile(row, place))  # type: ignore[misc]
    return rows_of(found)


def too_large(spec: Spec, memory: int) -> str:
    """Why a rank of the row would not fit into `memory` bytes, by the plan; empty where it does."""
    from genatt_dist.plan.run import Cluster, plan

    copies = 10 if spec.table == "replicated" else 4  # weights, gradient, moments, buckets, their parts
    if copies * (spec.items + 1) * spec.width * 4 + (2 << 30) < memory:
        return ""  # plainly: no need to ask the plan, which takes a second
    needed = plan(spec.config, Cluster.of(1, spec.world_size, "cpu"), items=spec.items, advise=False)
    bytes_ = needed.memory.training("host")
    if bytes_ <= memory:
        return ""
    return f"would take about {bytes_ // MIB:,} MiB a rank by `genatt plan`, of the {memory // MIB:,} MiB it may take"


def rows_of(found: Sequence[Measured]) -> list[dict[str, Any]]:
    """The result's rows of one cell, each with its ratios to the rows it is compared with."""
    return [_row(one, found) for one in found]


def _row(one: Measured, found: Sequence[Measured]) -> dict[str, Any]:
    spec, ok = one.spec, one.status == "ok" and bool(one.rounds)
    seconds = statistics.median(one.rounds) if ok else None
    tenths = statistics.quantiles(one.steps, n=10, method="inclusive") if ok and len(one.steps) > 1 else None
    row: dict[str, Any] = {
        **spec.model_dump(),
        "status": one.status,
        "ms_per_step": _rounded(seconds, 1e3),
        "ms_p10": _rounded(tenths[0] if tenths else None, 1e3),
        "ms_p90": _rounded(tenths[-1] if tenths else None, 1e3),
        "repeats": len(one.steps),
        "tokens_per_second": _rounded(spec.tokens / seconds if seconds else None),
        "peak_memory_mb": _rounded(one.peak_bytes, 1 / MIB),
        **one.machine,
    }
    if one.note:
        row["note"] = one.note
    if seconds and one.parts:
        row["parts_ms"] = {name: _rounded(share * seconds, 1e3) for name, share in parts(one.parts).items()}
    if ok and spec.ranks > 1:
        row |= {name: _rounded(value) for name, value in _ratios(one, found).items()}
    return row


def _ratios(one: Measured, found: Sequence[Measured]) -> dict[str, float | None]:
    """weak_efficiency: one rank's time over this row's, at equal sequences a rank. strong_speedup: at equal global
    batches. of_ceiling: the independent processes' time over this row's.
    """
    spec = one.spec
    a_rank = spec.batch if spec.independent else spec.batch // spec.ranks

    def over(other: Spec) -> float | None:
        base = next((each for each in found if each.spec == other and each.status == "ok"), None)
        if base is None:
            return None
        return statistics.median(theirs / mine for theirs, mine in zip(base.rounds, one.rounds, strict=True))

    single = spec.model_copy(update={"ranks": 1, "independent": False})
    weak = over(single.model_copy(update={"batch": a_rank}))
    if spec.independent:
        return {"weak_efficiency": weak}
    alone = spec.model_copy(update={"batch": a_rank, "independent": True})
    return {"weak_efficiency": weak, "strong_speedup": over(single), "of_ceiling": over(alone)}


def parts(ranks: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Shares of the parts over ranks: the mean; of an exchange what the rank that waited least had, and the rest of the
    mean is waiting for the slower rank.
    """
    found = {name: statistics.mean(each[name] for each in ranks) for name in ranks[0]}
    waiting = 0.0
    for name in EXCHANGES:
        least = min(each[name] for each in ranks)
        waiting += found[name] - least
        found[name] = least
    return found | {WAITING: waiting}


def _slug(spec: Spec) -> str:
    words = [spec.attention, f"T{spec.steps}" if spec.steps else "", f"{spec.items}", spec.table, spec.loss]
    words += [f"{spec.ranks}{'x1' if spec.independent else ''}", f"b{spec.batch}"]
    return "-".join(word for word in words if word)


def _rounded(value: float | None, scale: float = 1.0) -> float | None:
    """Four digits: more are not measured."""
    return None if value is None else float(f"{value * scale:.4g}")
