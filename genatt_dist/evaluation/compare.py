"""Evaluated runs compared user by user (`genatt compare`): what they must share, and the table of differences.

Reads what `genatt evaluate` left in each run; torch is not imported.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import polars as pl
from rich.console import Console
from rich.table import Table

from data_pipeline.errors import GenattError
from genatt_dist import runs
from genatt_dist.evaluation.statistics import Ranks, check_metric, compare, holm

# What makes figures comparable. Length of history, loss and selection are the model's own affair.
_SHARED = ("split", "ranking", "exclude_seen", "k_core", "order")


@dataclass(frozen=True)
class Evaluated:
    """An evaluated run. rank_U: ranks of the targets, users sorted by id; user_U: their ids."""

    run: Path
    model: str
    dataset: dict[str, Any]
    protocol: dict[str, Any]
    user_U: pl.Series
    rank_U: Ranks


def read(run: Path, split: str) -> Evaluated:
    """What `genatt evaluate RUN --split SPLIT` left of a finished run; GenattError with the command that is due."""
    runs.read_config(run)
    evaluate = f"`genatt evaluate {run} --split {split}`"
    if not (run / runs.SUMMARY).exists():
        raise GenattError(
            f"{run} is not trained to its end (no {runs.SUMMARY} in it): run `genatt train {run / runs.CONFIG} "
            f"--run {run} --resume`, then {evaluate}"
        )
    try:
        report = json.loads((run / f"evaluation-{split}.json").read_text())
        ranks = pl.read_parquet(run / f"ranks-{split}.parquet").drop_nulls().sort("user_id")
        model, users, dataset, protocol = (report[key] for key in ("model", "users", "dataset", "protocol"))
        rank_U = ranks["rank"].cast(pl.Int64).to_numpy()
    except (OSError, ValueError, KeyError, TypeError, pl.exceptions.PolarsError):
        raise GenattError(f"{run} is not evaluated on {split}: run {evaluate}") from None
    if ranks.height != users:
        raise GenattError(
            f"{run}: ranks-{split}.parquet has {ranks.height} users, its evaluation {users}: run {evaluate} again"
        )
    return Evaluated(run, model, dataset, protocol, ranks["user_id"], rank_U)


def check_comparable(reference: Evaluated, other: Evaluated, split: str) -> None:
    """Raises GenattError unless both ranked the same users' targets, on the same data, under the same protocol."""
    where = f"{reference.run} and {other.run} cannot be compared"
    if reference.dataset != other.dataset:
        hashes = " and ".join(
            f"{one.dataset['name']} {one.dataset['manifest_hash'][:12]}…" for one in (reference, other)
        )
        raise GenattError(f"{where}: trained on different data ({hashes}); train both on one prepared data set")
    for key in _SHARED:
        ours, theirs = reference.protocol.get(key), other.protocol.get(key)
        if ours != theirs:
            raise GenattError(
                f"{where}: {key} is {ours!r} in one and {theirs!r} in the other; evaluate both the same way"
            )
    if not reference.user_U.equals(other.user_U):
        alone = len(set(reference.user_U) ^ set(other.user_U))
        raise GenattError(
            f"{where}: {alone} users are in one of them alone ({len(reference.user_U)} and {len(other.user_U)} users "
            f"on {split}); run `genatt evaluate` on both again"
        )


def compare_runs(
    paths: Sequence[Path],
    split: str,
    metric: str,
    resamples: int = 10_000,
    confidence: float = 0.95,
    seed: int = 0,
) -> dict[str, Any]:
    """Every run against the first: differences with interval, p and Holm's p over all of them, as plain values."""
    check_metric(metric)
    places = [path.resolve() for path in paths]
    for number, place in enumerate(places):
        if place in places[:number]:
            raise GenattError(f"{paths[number]} is given twice: name each run once")
    reference, *others = [read(path, split) for path in paths]
    if not others:
        raise GenattError(f"one run alone, {paths[0]}, cannot be compared: name at least two")
    for other in others:
        check_comparable(reference, other, split)
    found = [compare(other.rank_U, reference.rank_U, metric, resamples, confidence, seed) for other in others]
    corrected = holm([one.p for one in found])
    return {
        "split": split,
        "metric": metric,
        "users": len(reference.rank_U),
        "reference": {"run": str(reference.run), "model": reference.model, "value": found[0].reference},
        "bootstrap": {"resamples": resamples, "confidence": confidence, "seed": seed, "unit": "user"},
        "comparisons": [
            {"run": str(other.run), "model": other.model, **asdict(one), "relative": finite(one.relative), "p_holm": p}
            for other, one, p in zip(others, found, corrected, strict=True)
        ],
    }


def print_comparison(report: dict[str, Any], console: Console | None = None) -> None:
    """The differences as a table."""
    reference, share = report["reference"], f"{report['bootstrap']['confidence']:.0%}"
    table = Table(
        title=f"{report['metric']} on {report['split']}, {report['users']:,} users; reference "
        f"{reference['run']}: {reference['value']:.4f}",
        title_justify="left", title_style="", box=None, pad_edge=False,
    )  # fmt: skip
    table.add_column("run", overflow="fold")
    for name in (report["metric"], "difference", "relative", f"{share} interval", "p", "p (Holm)"):
        table.add_column(name, justify="right", no_wrap=True)
    paths = [Path(one["run"]) for one in report["comparisons"]]
    short = len({path.name for path in paths}) == len(paths)
    for path, one in zip(paths, report["comparisons"], strict=True):
        table.add_row(path.name if short else str(path), *cells(one))
    (console or Console()).print(table)


def cells(one: dict[str, Any]) -> list[str]:
    """Value, difference, relative difference, interval, p and Holm's p of a comparison, as text."""
    relative = "–" if one["relative"] is None else f"{one['relative']:+.1%}"
    interval = f"{one['low']:+.4f}, {one['high']:+.4f}"
    return [
        f"{one['value']:.4f}",
        f"{one['difference']:+.4f}",
        relative,
        interval,
        f"{one['p']:.4f}",
        f"{one['p_holm']:.4f}",
    ]


def finite(value: float) -> float | None:
    """The value, or None where it is no number: JSON has none."""
    return value if math.isfinite(value) else None
