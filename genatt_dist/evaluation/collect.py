"""Evaluated runs as one report (`genatt report`): read from what training and evaluation left in each, torch is not
imported.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data_pipeline.errors import GenattError
from genatt_dist import runs
from genatt_dist.evaluation.steps_plots import wrong_field

# What must be equal for metrics to stand in one table.
_SHARED = ("split", "ranking", "exclude_seen", "k_core", "order")

# What an evaluation must hold, by the keys that lead to it; an older program's may not.
_NEEDED: Mapping[tuple[str, ...], type] = {
    ("model",): str,
    ("dataset",): dict,
    ("dataset", "name"): str,
    ("dataset", "manifest_hash"): str,
    ("protocol",): dict,
    ("metrics",): dict,
}


def collect(paths: Sequence[Path], steps: Path | None = None) -> tuple[dict[str, Any], dict[str, Path]]:
    """The report of these runs, as `write_report` takes it, and each model's run.

    A model has the name of its attention, or, where two have the same, of its run directory. steps: the rows that
    `genatt bench steps` wrote. Raises GenattError: a run that is none, is not evaluated, or is of other data; two runs
    of one name; rows that cannot be read.
    """
    evaluated = {path: _read(path) for path in paths}
    (first, reference), *others = evaluated.items()
    for path, evaluation in others:
        _check_comparable(first, reference, path, evaluation)
    names = _names({path: str(evaluation["model"]) for path, evaluation in evaluated.items()})
    report: dict[str, Any] = {
        "dataset": {key: value for key, value in reference["dataset"].items() if key != "manifest_hash"},
        "protocol": _protocol({names[path]: evaluation["protocol"] for path, evaluation in evaluated.items()}),
        "models": [_model(names[path], path, evaluation) for path, evaluation in evaluated.items()],
    }
    if steps is not None:
        report["steps"] = _read_steps(steps)
    return report, {name: path for path, name in names.items()}


def _read(run: Path) -> dict[str, Any]:
    """The test evaluation of a run that was trained to its end."""
    runs.read_config(run)
    command = f"genatt evaluate {run} --split test"
    try:
        evaluation = json.loads((run / "evaluation-test.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise GenattError(f"{run} is not evaluated on test (no evaluation-test.json in it): run `{command}`") from None
    for keys, what in _NEEDED.items():
        if not isinstance(_at(evaluation, keys), what):
            raise GenattError(f"{run}: evaluation-test.json has no {'.'.join(keys)}: run `{command}` again")
    if not (run / runs.SUMMARY).exists():
        raise GenattError(
            f"{run} is not trained to its end (no {runs.SUMMARY} in it): go on with `genatt train --resume`"
        )
    return dict(evaluation)


def _at(value: Any, keys: Sequence[str]) -> Any:
    """What lies under the keys, one below the other; None where nothing does."""
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _check_comparable(first: Path, reference: Mapping[str, Any], path: Path, evaluation: Mapping[str, Any]) -> None:
    if reference["dataset"]["manifest_hash"] != evaluation["dataset"]["manifest_hash"]:
        raise GenattError(
            f"{first} and {path} are of different data ({reference['dataset']['name']} and "
            f"{evaluation['dataset']['name']}, by their manifests): give each a report of its own"
        )
    for key in _SHARED:
        ours, theirs = reference["protocol"].get(key), evaluation["protocol"].get(key)
        if ours != theirs:
            raise GenattError(
                f"{first} and {path} were evaluated differently: {key} is {ours!r} and {theirs!r}; give each a report "
                "of its own"
            )


def _names(models: Mapping[Path, str]) -> dict[Path, str]:
    """Attention types where they differ, else names of run directories, which must differ then."""
    if len(set(models.values())) == len(models):
        return dict(models)
    names = {path: path.resolve().name for path in models}
    name, count = Counter(names.values()).most_common(1)[0]
    if count > 1:
        raise GenattError(f"{count} runs are called {name}: name runs whose directories have different names")
    return names


def _protocol(protocols: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The protocol all models share; where they differ, each with its value."""
    joined: dict[str, Any] = {}
    for key in dict.fromkeys(key for protocol in protocols.values() for key in protocol):
        values = {name: protocol.get(key) for name, protocol in protocols.items()}
        shared = list(values.values())
        equal = all(value == shared[0] for value in shared)
        joined[key] = shared[0] if equal else ", ".join(f"{value} ({name})" for name, value in values.items())
    return joined


def _model(name: str, run: Path, evaluation: Mapping[str, Any]) -> dict[str, Any]:
    try:
        summary = json.loads((run / runs.SUMMARY).read_text(encoding="utf-8"))
        valid, train = ranking_only(summary["valid"]), dict(summary["train"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise GenattError(f"{run}: {runs.SUMMARY} cannot be read: train the run again") from None
    return {
        "name": name,
        "seed": runs.read_config(run).training.seed,
        "valid": valid,
        "test": ranking_only(evaluation["metrics"]),
        "train": train,
    }


def ranking_only(metrics: Mapping[str, float]) -> dict[str, float]:
    """Without the statistics of the maps, which the report draws from metrics.jsonl."""
    return {name: value for name, value in metrics.items() if "/" not in name}


def _read_steps(path: Path) -> list[dict[str, Any]]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise GenattError(
            f"cannot read --steps {path}: {error.strerror}; `genatt bench steps --out` writes it"
        ) from None
    except ValueError:
        raise GenattError(f"--steps {path} is not JSON: name a file that `genatt bench steps --out` wrote") from None
    rows = content.get("rows") if isinstance(content, dict) else content
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise GenattError(f"--steps {path} holds no rows: name a file that `genatt bench steps --out` wrote")
    for number, row in enumerate(rows, start=1):
        if field := wrong_field(row):
            raise GenattError(
                f"--steps {path}: row {number} is none of `genatt bench steps` (its {field} is "
                f"{repr(row[field]) if field in row else 'missing'}): name a file that `genatt bench steps --out` wrote"
            )
    return rows
