"""The grid, measured cell by cell and written as it comes.

First every variant runs alone in a fresh process: its memory, and whether it can be timed at all. Then all of a cell
that can are timed by turns in one process, in another random order every round, the dot product several times a round.
A ratio is the median over rounds of (the variant's time / the dot product's median time in that round): a machine that
slows down for a while slows both.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import random
import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from benchmarks.steps import targets
from benchmarks.steps.child import MIB, Alone, Child, Limits, NoMemoryError, TimeLimitError, environment
from benchmarks.steps.grid import Variant, cells
from data_pipeline.errors import GenattError

LEAST_REPEATS = 5  # of a row that is `ok`
_BETWEEN_CONTROLS = 8  # variants timed between two turns of the dot product
_SHORTEST = 0.05  # seconds a timing should last: shorter steps are timed in a row
_SEED = 0

Row = dict[str, Any]
Times = dict[Variant, list[list[float]]]  # seconds of a step: for each round, those of the variant's turns


@dataclass(frozen=True)
class Settings:
    """How carefully to measure.

    rounds: timings of a variant, at least 5. variant_seconds: what the timings of one variant may take together; those
    that would need longer for 5 repeats get the status time_limit. memory_mb: MiB a variant may take, None: most of
    what is free. num_items: V.
    """

    rounds: int = LEAST_REPEATS
    variant_seconds: float = 10.0
    memory_mb: int | None = None
    num_items: int = 12_101


def measure(variants: Sequence[Variant], settings: Settings, out: Path, command: str, console: Console) -> list[Row]:
    """Measure all variants and write their rows to `out` after every cell; returns the rows.

    Raises GenattError where `out` cannot be written, before anything is measured.
    """
    result: dict[str, Any] = {
        "command": command,
        "settings": asdict(settings),
        "cores": os.cpu_count(),
        "allocator": "kept (MALLOC_* of worker_environment)",
        "targets": [],
        "rows": [],
    }
    write(result, out)
    rows: list[Row] = result["rows"]
    limits = Limits(settings.memory_mb * MIB if settings.memory_mb else None, settings.variant_seconds)
    expected = {variant: _expected(variant, settings) for variant in variants}
    done = 0.0
    bar = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with environment(), Progress(*bar, TextColumn("left"), TimeRemainingColumn(), console=console) as progress:
        with Child(settings.num_items) as child:
            machine = child.ask("machine") | {"versions": _versions()}
        task = progress.add_task("", total=sum(expected.values()))

        def turn(variant: Variant) -> None:
            """One of the rounds + 2 turns a variant mostly has."""
            progress.update(task, description=variant.label, advance=expected[variant] / (settings.rounds + 2))

        for members in cells(variants).values():
            alone = {variant: _alone(variant, limits, settings, turn) for variant in _shuffled(members)}
            rows += _rows(members, alone, _times(alone, settings, turn), machine)
            result["targets"] = targets.judge(rows, settings.num_items)
            write(result, out)
            done += sum(expected[variant] for variant in members)
            progress.update(task, completed=done)
    return rows


def write(result: dict[str, Any], out: Path) -> None:
    """The result so far; the file is whole at any time."""
    temporary = out.with_name(f".{out.name}.tmp")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        head = {name: value for name, value in result.items() if name != "rows"}
        text = json.dumps(head, indent=2).removesuffix("\n}")
        # One row a line: it can be read, and compared with another run's.
        lines = ",\n".join(f"    {json.dumps(row)}" for row in result["rows"])
        temporary.write_text(f'{text},\n  "rows": [\n{lines}\n  ]\n}}\n')
        temporary.rename(out)
    except OSError as error:
        raise GenattError(f"cannot write {out}: {error.strerror or error}; choose another --out") from None


def _alone(variant: Variant, limits: Limits, settings: Settings, turn: Callable[[Variant], None]) -> Alone:
    """One variant in a process of its own."""
    turn(variant)
    with Child(settings.num_items) as child:
        try:
            # Generous: the child itself declines what looks longer than the limit.
            answer: Alone = child.ask("alone", variant, limits, seconds=60 + 10 * limits.seconds)
        except NoMemoryError as error:
            return Alone("out_of_memory", note=str(error))
        except TimeLimitError:
            return Alone("time_limit", note="did not end in time")
    return answer


def _times(alone: dict[Variant, Alone], settings: Settings, turn: Callable[[Variant], None]) -> Times:
    """The timings of each variant of a cell that can be repeated often enough."""
    repeats = {
        variant: min(settings.rounds, int(settings.variant_seconds / found.seconds))
        for variant, found in alone.items()
        if found.status == "ok" and found.seconds
    }
    variants = [variant for variant, count in repeats.items() if count >= LEAST_REPEATS]
    times: Times = defaultdict(list)
    if not variants:
        return times
    with Child(settings.num_items) as child:
        child.ask("prepare", variants)
        index = {variant: number for number, variant in enumerate(variants)}
        passes = {}
        for variant in variants:  # warms up, and says how many steps make a timing long enough
            turn(variant)
            passes[variant] = max(1, math.ceil(_SHORTEST / child.ask("time", index[variant], 0, 1)))
        for number in range(settings.rounds):
            turns: dict[Variant, list[float]] = defaultdict(list)
            for variant in _order([variant for variant in variants if repeats[variant] > number], number):
                turn(variant)
                turns[variant].append(child.ask("time", index[variant], 1 + number, passes[variant]))
            for variant, seconds in turns.items():
                times[variant].append(seconds)
    return times


def _order(variants: Sequence[Variant], number: int) -> list[Variant]:
    """The turns of a round: all in random order, the dot product at its ends and after every few others."""
    controls = [variant for variant in variants if variant.attention == "dot_product"]
    others = _shuffled([variant for variant in variants if variant.attention != "dot_product"], number)
    parts = [others[low : low + _BETWEEN_CONTROLS] for low in range(0, len(others), _BETWEEN_CONTROLS)]
    return [variant for part in parts for variant in (*controls, *part)] + controls


def _shuffled(variants: Sequence[Variant], number: int = -1) -> list[Variant]:
    return random.Random(f"{_SEED} {number}").sample(list(variants), len(variants))


def _rows(members: Sequence[Variant], alone: dict[Variant, Alone], times: Times, machine: Row) -> list[Row]:
    """The rows of one cell, in the grid's order."""
    control = next(
        (times[variant] for variant in members if variant.attention == "dot_product" and variant in times), []
    )
    return [row(variant, alone[variant], times.get(variant, []), control, machine) for variant in members]


def row(variant: Variant, alone: Alone, times: list[list[float]], control: list[list[float]], machine: Row) -> Row:
    """One row of the result. times and control: seconds of the turns of each round, the variant's and its dot
    product's.

    A variant too long to be repeated has the time of its one step alone, and over the dot product's median a ratio that
    is not paired; its status is time_limit.
    """
    rounds, controls = ([statistics.median(turns) for turns in each] for each in (times, control))
    status, note = alone.status, alone.note
    if status == "ok" and not rounds:
        status, note, rounds = "time_limit", "one step, alone; its ratio is not paired", [alone.seconds or math.nan]
        controls = [statistics.median(controls)] if controls else []
    ratio = (
        statistics.median(mine / theirs for mine, theirs in zip(rounds, controls, strict=False))
        if rounds and controls
        else None
    )
    middle = statistics.median(rounds) if rounds else None
    tenths = statistics.quantiles(rounds, n=10, method="inclusive") if len(rounds) > 1 else None
    return {
        **asdict(variant),
        "status": status,
        "ms_per_step": _rounded(middle, 1e3),
        "ms_p10": _rounded(tenths[0] if tenths else None, 1e3),
        "ms_p90": _rounded(tenths[-1] if tenths else None, 1e3),
        "repeats": len(rounds),
        "sequences_per_second": _rounded(variant.batch / middle if middle else None),
        "peak_memory_mb": _rounded(alone.peak_bytes, 1 / MIB),
        "ratio_to_dot_product": _rounded(ratio),
        **machine,
        **({"note": note} if note else {}),
    }


def _rounded(value: float | None, scale: float = 1.0) -> float | None:
    """Four digits: more are not measured."""
    return None if value is None else float(f"{value * scale:.4g}")


def _versions() -> dict[str, str]:
    return {"python": platform.python_version()} | {
        name: importlib.metadata.version(name) for name in ("torch", "genatt-dist")
    }


def _expected(variant: Variant, settings: Settings) -> float:
    """Seconds a variant may take in all, roughly: what the progress bar counts in. Only proportions matter."""
    share = {"all_n": 1.0, "beauty": 0.5 if variant.mode == "training" else 0.12}[variant.lengths]
    positions = variant.batch * variant.max_len * share
    denoised = 0 if variant.steps is None or variant.sampler == "one_step" else variant.steps
    if variant.mode == "training":
        step = positions * (2e-5 + 5e-5 * variant.softmax + 1e-6 * variant.blocks * denoised)
    else:
        blocks = variant.blocks - 1 if variant.sample_blocks == "all" else 0
        step = positions * (2e-6 + 7e-7 * blocks * denoised) + variant.batch * (
            7e-5 * variant.softmax + 2e-6 * denoised
        )
    repeats = settings.rounds + 2 if LEAST_REPEATS * step < settings.variant_seconds else 1
    return 0.3 + repeats * max(step, _SHORTEST)
