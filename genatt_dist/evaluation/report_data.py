"""The models of a report with what their runs logged, and how their names and numbers are written."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

BASELINE = "popularity"
HEADLINE = "ndcg@10"

ACCURACY = ("recall", "ndcg", "mrr")
# How a metric is written, in the order of tables.
METRICS = {
    "recall": "Recall",
    "ndcg": "NDCG",
    "mrr": "MRR",
    "coverage": "Coverage",
    "cc": "CC",
    "f": "F",
    "ild": "ILD",
    "gini": "Gini",
    "novelty": "Novelty",
}

# One colour a model on every plot, readable on light and dark; models not named here take the spare ones in order.
COLOURS = {
    BASELINE: "#8b929c",
    "dot_product": "#3f7fd0",
    "variational": "#d9822b",
    "diffusion": "#1f9d77",
    "hybrid": "#c94f6d",
    "deterministic": "#9b59c9",
    "positional": "#7a8b2a",
    "gru": "#2a9fb0",
    "noisy_dot_product": "#6f6fe0",
}
SPARE_COLOURS = ("#b0763c", "#d05fb0", "#4f8f4f", "#a8483a")
MAPS_SIZE = 2_500_000  # characters of maps on a page: with plotly's 4.8 million it stays below 8


@dataclass
class Model:
    """One row of the report with the log of its run."""

    label: str
    colour: str
    test: Mapping[str, float]
    valid: Mapping[str, float]
    train: Mapping[str, Any]
    seed: int | None = None
    users: int | None = None  # that were evaluated
    log: Mapping[str, list[dict[str, Any]]] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    maps: Mapping[str, Any] = field(default_factory=dict)

    @property
    def best(self) -> Mapping[str, Any]:
        """The validation record with the best HEADLINE: the epoch that is tested."""
        lines = [line for line in self.log.get("valid", []) if finite(line.get(HEADLINE))]
        return max(lines, key=lambda line: line[HEADLINE], default={})

    def series(self, kind: str, x: str, y: str) -> tuple[list[float], list[float]]:
        """The finite values of y against x in the lines of one kind."""
        pairs = [(line[x], line[y]) for line in self.log.get(kind, []) if finite(line.get(x)) and finite(line.get(y))]
        return [pair[0] for pair in pairs], [pair[1] for pair in pairs]


def read_models(report: Mapping[str, Any], runs: Mapping[str, Path]) -> list[Model]:
    """One row a model, in the report's order, with what its run logged. runs: model name (or label) → run directory."""
    entries = report.get("models", [])
    names = [entry["name"] for entry in entries]
    spare = iter(SPARE_COLOURS * (len(entries) // len(SPARE_COLOURS) + 1))
    models = []
    for entry in entries:
        name = entry["name"]
        # The same model at several seeds: the seed tells them apart.
        label = f"{name} (seed {entry.get('seed')})" if names.count(name) > 1 else name
        run = runs.get(label, runs.get(name))
        models.append(
            Model(
                label=label,
                colour=COLOURS[name] if label in COLOURS else next(spare),
                test=entry.get("test") or {},
                valid=entry.get("valid") or {},
                train=entry.get("train") or {},
                seed=entry.get("seed"),
                users=_read_users(Path(run) / "evaluation-test.json") if run else None,
                log=_read_log(Path(run) / "metrics.jsonl") if run else {},
                environment=_read_environment(Path(run) / "environment.json") if run else {},
                maps=_read_maps(Path(run) / "maps-test.json") if run else {},
            )
        )
    return models


def chosen_maps(models: Sequence[Model]) -> list[dict[str, Any]]:
    """The maps a page shows, a model each with its label and users: as many users as MAPS_SIZE has room for, and where
    there is none for a user of each model, as many models.
    """
    shown = [model for model in models if model.maps]
    sizes = [[len(json.dumps(user, separators=(",", ":"))) for user in model.maps["users"]] for model in shown]
    most = max(map(len, sizes), default=0)
    choices = [(len(shown), users) for users in range(most, 0, -1)] + [(kept, 1) for kept in range(len(shown), 0, -1)]
    for kept, users in choices:
        if sum(sum(size[:users]) for size in sizes[:kept]) <= MAPS_SIZE:
            return [
                {**model.maps, "label": pretty(model.label), "users": model.maps["users"][:users]}
                for model in shown[:kept]
            ]
    return []


def _read_log(path: Path) -> dict[str, list[dict[str, Any]]]:
    """Lines of metrics.jsonl by kind. A line that a killed run left half written is passed over."""
    lines: dict[str, list[dict[str, Any]]] = defaultdict(list)
    if path.is_file():
        for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                line = json.loads(text)
            except json.JSONDecodeError:
                continue
            if isinstance(line, dict):
                lines[line.get("kind", "")].append(line)
    return lines


def _read_environment(path: Path) -> dict[str, str]:
    try:
        return dict(_flatten(json.loads(path.read_text(encoding="utf-8"))))
    except (OSError, json.JSONDecodeError):
        return {}


def _read_users(path: Path) -> int | None:
    """How many users the test metrics are means over: not all of a data set have a test target."""
    try:
        users = json.loads(path.read_text(encoding="utf-8"))["users"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return users if isinstance(users, int) else None


def _read_maps(path: Path) -> dict[str, Any]:
    """What `genatt evaluate` kept of some users' maps; nothing where a run was evaluated without them."""
    try:
        maps = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    shown = isinstance(maps, dict) and maps.get("users") and maps["users"][0]["maps"]  # a GRU has none
    return maps if shown else {}


def _flatten(value: Any, prefix: str = "") -> Iterable[tuple[str, str]]:
    if isinstance(value, dict):
        for key, part in value.items():
            yield from _flatten(part, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(value, list):
        yield prefix, ", ".join(map(str, value))
    else:
        yield prefix, str(value)


def pretty(name: str) -> str:
    """A key as a reader writes it: ndcg@10 → NDCG@10, dot_product → dot product, zero_stage → ZeRO stage."""
    metric, at, k = name.partition("@")
    if metric in METRICS:
        return METRICS[metric] + at + k
    return name.replace("sequences_per_second", "sequences/s").replace("zero_stage", "ZeRO stage").replace("_", " ")


def metric_order(name: str) -> tuple[int, str, int]:
    """Sorts metrics as a reader expects them: as METRICS, each by its cutoff."""
    metric, _, k = name.partition("@")
    order = list(METRICS)
    return (order.index(metric) if metric in order else len(order), metric, int(k) if k.isdigit() else 0)


def is_accuracy(name: str) -> bool:
    """Whether a metric says how well targets are ranked, not what the lists hold."""
    return name.partition("@")[0] in ACCURACY


def is_lower_better(name: str) -> bool:
    """Whether the smallest value of a metric is the best."""
    return name.partition("@")[0] == "gini"


def number(value: Any) -> str:
    """A count or a rate as text, a dash where there is none."""
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:,.1f}" if math.isfinite(value) else str(value)
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def finite(value: Any) -> TypeGuard[float]:
    """Whether a value is a number that can be drawn."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def without_nan(value: Any) -> Any:
    """NaN and infinities as None, at any depth: JSON has none, and browsers refuse what Python writes for them."""
    if isinstance(value, list | tuple):
        return [without_nan(part) for part in value]
    if isinstance(value, Mapping):
        return {key: without_nan(part) for key, part in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
