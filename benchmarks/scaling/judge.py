"""The model fitted to the rows it may see and held against the others, and weak scaling against its target.

Rows of several ranks are a split of their own: of what is held out they alone hold exchanges and waiting, which is what
a model of scaling is for. Beside their errors stand those of the null model, by which R ranks cost what one costs with
the same sequences a rank: a model that is no better says nothing about scaling.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.scaling.grid import ScalingConfig, Spec, held_out
from data_pipeline.errors import GenattError

if TYPE_CHECKING:
    from benchmarks.scaling.model import Model

TARGET = 0.95
FITTED, ALONE, TOGETHER = "fitted", "held out, one rank or independent", "held out, several ranks"
# Of a row, by the model.
_SAID = (
    *("split", "model_ms", "model_error", "model_exchange_ms", "model_waiting_ms", "unwaited_error"),
    *("null_error", "model_weak_efficiency"),
)
Rows = Sequence[dict[str, Any]]


def spec_of(row: Mapping[str, Any]) -> Spec:
    """What was to be measured, of a row of results."""
    return Spec(**{name: row[name] for name in Spec.model_fields})


def read_results(path: Path) -> tuple[dict[str, Any], ScalingConfig]:
    """A file of results and what it was measured with. Raises GenattError where it is none."""
    try:
        result = json.loads(path.read_text())
        config = ScalingConfig.model_validate(result["config"])
        if not result["rows"] or not isinstance(result["collectives"], dict):
            raise ValueError
        for row in result["rows"]:
            spec_of(row)
    except OSError as error:
        raise GenattError(
            f"cannot read {path}: {error.strerror}; name a file that `genatt bench scaling` wrote"
        ) from None
    except (ValueError, KeyError, TypeError):
        raise GenattError(f"{path} holds no rows of `genatt bench scaling`: name its --out of a finished run") from None
    return result, config


def read_model(path: Path, config: ScalingConfig) -> Model:
    """The one that another file's rows were fitted to. Raises GenattError where there is none for these ranks."""
    from benchmarks.scaling import features
    from benchmarks.scaling.model import Model

    result, _ = read_results(path)
    try:
        model = Model.read(result["model"], features.NAMES)
    except KeyError:
        raise GenattError(f"--model {path} holds no fitted model: name the results of a larger grid") from None
    if missing := sorted(set(config.ranks) - set(model.weights)):
        raise GenattError(
            f"--model {path} knows {','.join(map(str, sorted(model.weights)))} busy cores, not "
            f"{','.join(map(str, missing))}: measure it with --ranks {','.join(map(str, config.ranks))}"
        )
    return model


def modelled(
    rows: Rows, timed: Mapping[str, Rows], config: ScalingConfig, other: tuple[str, Model] | None = None
) -> dict[str, Any]:
    """Fit the model to the rows it may see, and add to each measured row what it says of it: `split`, `model_ms`,
    `model_error`; to a row of several ranks also what of that is exchange and waiting, the errors without waiting
    (`unwaited_error`) and of the null model, and `model_weak_efficiency`. other: the name of a file and
    its model, which is then held against all rows. Returns what was fitted and how well held-out rows were met; a note
    where rows to fit to are missing.
    """
    from benchmarks.scaling import features
    from benchmarks.scaling.model import TOLERANCE

    for row in rows:
        for name in _SAID:
            row.pop(name, None)
    measured = {spec_of(row): row for row in rows if row["ms_per_step"]}
    works = {spec: features.work(spec) for spec in measured}
    for spec, row in measured.items():
        held = other is not None or held_out(spec, config.batch)
        row["split"] = (TOGETHER if spec.world_size > 1 else ALONE) if held else FITTED
    model = other[1] if other else _fitted(measured, works, timed, config)
    if isinstance(model, str):
        return {"note": model}
    for spec, row in measured.items():
        computing = model.computing(works[spec].amounts, spec.ranks)
        waiting = model.waiting(computing, spec.world_size)
        exchanged = sum(works[spec].exchanged(model.links[spec.world_size]).values()) if spec.world_size > 1 else 0.0
        row["model_ms"] = _digits(1e3 * (computing + exchanged + waiting))
        row["model_error"] = _error(row["model_ms"], row)
        if spec.world_size > 1:
            row["model_exchange_ms"] = _digits(1e3 * exchanged)
            row["model_waiting_ms"] = _digits(1e3 * waiting)
            row["unwaited_error"] = _error(1e3 * (computing + exchanged), row)
    for spec, row in measured.items():
        single = measured.get(spec.model_copy(update={"ranks": 1, "batch": spec.batch // spec.ranks}))
        if spec.world_size > 1 and single is not None:
            row["null_error"] = _error(single["ms_per_step"], row)
            row["model_weak_efficiency"] = round(single["model_ms"] / row["model_ms"], 4)
    splits = {name: [row for row in measured.values() if row["split"] == name] for name in (FITTED, ALONE, TOGETHER)}
    errors: dict[str, Any] = {name: _errors(some, "model_error") for name, some in splits.items() if some}
    if TOGETHER in errors:
        errors[TOGETHER] |= _several(splits[TOGETHER])
    unseen = [abs(row["model_error"]) for name in (ALONE, TOGETHER) for row in splits[name]]
    return {
        **({"fitted_in": other[0]} if other else {}),
        **model.saved(features.NAMES),
        "errors": errors,
        "tolerance": TOLERANCE,
        "met": bool(unseen) and max(unseen) <= TOLERANCE,
    }


def _fitted(
    measured: Mapping[Spec, dict[str, Any]], works: Mapping[Spec, Any], timed: Mapping[str, Rows], config: ScalingConfig
) -> Model | str:
    """The model, or why there is none."""
    import numpy as np

    from benchmarks.scaling.model import Model, deviation

    amounts: dict[int, list[Any]] = {}
    seconds: dict[int, list[float]] = {}
    independent: dict[int, list[dict[str, Any]]] = {}
    for spec, row in measured.items():
        if row["split"] == FITTED:
            amounts.setdefault(spec.ranks, []).append(works[spec].amounts)
            seconds.setdefault(spec.ranks, []).append(row["ms_per_step"] / 1e3)
            independent.setdefault(spec.ranks, []).append(row)
    for busy in config.ranks:
        some = amounts.get(busy, [])
        wanted = int(np.any(some, axis=0).sum()) if some else 1
        if len(some) < wanted:
            return (
                f"not fitted: {len(some)} rows that it may see at {busy} busy cores, of at least {wanted} (grid.py: "
                "`held_out` says which): measure more cells, or give --model FILE"
            )
    links = {int(ranks): some for ranks, some in timed.items()}
    return Model.fit(amounts, seconds, links, {busy: deviation(some) for busy, some in independent.items()})


def _error(milliseconds: float, row: Mapping[str, Any]) -> float:
    return round(milliseconds / row["ms_per_step"] - 1, 4)


def _digits(value: float) -> float:
    """Four, as measured rows have."""
    return float(f"{value:.4g}")


def _errors(rows: Rows, name: str) -> dict[str, Any]:
    from benchmarks.scaling.model import TOLERANCE

    found = [abs(row[name]) for row in rows]
    return {
        "rows": len(found),
        "bias": round(statistics.mean(row[name] for row in rows), 4),
        "median": round(statistics.median(found), 5),
        "largest": round(max(found), 4),
        "within_tolerance": sum(error <= TOLERANCE for error in found),
    }


def _several(rows: Rows) -> dict[str, Any]:
    """What else is told of rows of several ranks: whether the model is too fast, the null model's errors, and how much
    of the loss under weak scaling it explains.
    """
    told = {
        "too_fast": sum(row["model_error"] < 0 for row in rows),
        "without_waiting": _errors(rows, "unwaited_error"),
    }
    compared = [row for row in rows if "null_error" in row and row.get("weak_efficiency")]
    if not compared:
        return told
    pairs = [(row["model_weak_efficiency"], row["weak_efficiency"]) for row in compared]
    lost = sum(1 - measured for _, measured in pairs)
    return told | {
        "null_model": _errors(compared, "null_error"),
        "weak_efficiency": {
            "cells": len(pairs),
            "target": TARGET,
            "met_by_model": sum(model >= TARGET for model, _ in pairs),
            "met_as_measured": sum(measured >= TARGET for _, measured in pairs),
            "median_difference": round(statistics.median(model - measured for model, measured in pairs), 4),
            "loss_explained": round(sum(1 - model for model, _ in pairs) / lost, 4) if lost > 0 else None,
        },
    }


def judged(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Weak scaling of each cell from one rank, against the target, processes that share nothing and the model."""
    found = []
    for row in rows:
        if row["ranks"] == 1 or row["independent"] or row.get("weak_efficiency") is None:
            continue
        spec = spec_of(row)
        found.append(
            {
                "what": f"{spec.cell.label}, 1 to {spec.ranks} ranks, {spec.batch // spec.ranks} sequences a rank",
                "target": TARGET,
                "found": row["weak_efficiency"],
                "of_ceiling": row.get("of_ceiling"),
                "by_model": row.get("model_weak_efficiency"),
                "met": row["weak_efficiency"] >= TARGET,
            }
        )
    return found
