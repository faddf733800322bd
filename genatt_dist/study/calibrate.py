"""Noise of a control matched to a generator: sigma by bisection, until maps vary between samples as much (MATH §6).

A gain of V-GenAtt over this control cannot be put down to jitter of the map alone. Training with the noise changes
the weights, hence the variation, so sigma is measured again after it and, where needed, found again on those weights.

Legend: B sequences, n width of the batch, H heads, N real tokens, D width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_pipeline.errors import GenattError
from genatt_dist.attention.attend import attention_map
from genatt_dist.config import RunConfig
from genatt_dist.data.histories import evaluation_batches
from genatt_dist.embedding.features import input_rows
from genatt_dist.evaluation.evaluate import sampling_context
from genatt_dist.model import diagnostics
from genatt_dist.model.diagnostics import own_maps, resampled
from genatt_dist.serving.trained import Trained, load
from genatt_dist.study.inference import under
from genatt_dist.study.paths import calibration_of, read_json, round_of, run_of, write_json
from genatt_dist.study.plan import Study

_CLOSE = 1e-3  # relative; training with the noise moves the variation by far more
_BATCH_USERS = 512
_LARGEST = 2.0**20
_HALVINGS = 60


@torch.no_grad()
def total_variation(trained: Trained, users: int) -> float:
    """½ Σ_j |a_ij − b_ij| between two samples of each map: mean over rows i ≥ 1 of the first validation users'
    histories, then over blocks. The draws are keyed, so that the same model gives the same figure.

    users: how many at least. Whole batches are measured, nearly equal ones of at most 512 users, hence up to one batch
    more than asked: with 2,048 of amazon-beauty's 22,363, five batches of 509.
    """
    config, backbone = trained.config, trained.backbone
    variation: dict[int, list[Tensor]] = {}
    left = users
    for histories in evaluation_batches(
        trained.sequences, "valid", config.data.max_len, min(users, _BATCH_USERS), 0, 1, trained.device
    ):
        if left <= 0:
            break
        rows_ND = input_rows(trained.table, histories)
        context = sampling_context(histories, config)
        first = backbone(rows_ND, context, sample=True).maps
        second = backbone(rows_ND, resampled(context, 1), sample=True).maps
        for block in own_maps(first):
            a_BHnn, b_BHnn = (attention_map(maps[block], context.layout).float() for maps in (first, second))
            variation.setdefault(block, []).append(diagnostics.total_variation(a_BHnn, b_BHnn, context.layout))
        left -= len(histories.user_B)
    if not variation:
        raise GenattError(
            f"model.attention.type={config.model.attention.type} draws no map, so its total variation is not defined: "
            "name a stochastic arm as match_noise.target"
        )
    return float(torch.stack([torch.cat(block).mean() for block in variation.values()]).mean())


def find_noise(variation: Callable[[float], float], target: float) -> tuple[float, float]:
    """(sigma, variation(sigma)) with the variation within a thousandth of `target`.

    variation rises with sigma from 0 at sigma = 0; sigma is doubled or halved until it brackets the target, then the
    bracket is halved on the logarithmic scale. Raises GenattError when no sigma reaches the target.
    """
    if not 0 < target < 1:
        raise GenattError(
            f"total variation {target:.4f} cannot be matched by noise: the target's maps must vary between samples"
        )
    variation = cache(variation)
    low = high = 1.0
    while variation(high) < target:
        low, high = high, 2 * high
        if high > _LARGEST:
            raise GenattError(
                f"no noise makes maps vary by {target:.4f}: with sigma={low:g} it is {variation(low):.4f}"
            )
    while low == high or variation(low) > target:
        low, high = low / 2, low
    for _ in range(_HALVINGS):
        middle = math.sqrt(low * high)
        found = variation(middle)
        if abs(found / target - 1) <= _CLOSE:
            break
        low, high = (middle, high) if found < target else (low, middle)
    return middle, found


@dataclass(frozen=True)
class _Round:
    """One training with a noise: where the noise was found, what it gave there, and what it gives after training."""

    noise: float
    found_on: str
    before_training: float
    after_training: float | None = None


def match(study: Study, out: Path, name: str, complete: Callable[[RunConfig, Path], None]) -> Path:
    """Train arm `name` with its noise matched and return the run directory of the training that met the target best.

    complete: trains a configuration in a run directory to its end. Rounds are recorded as they come, so that a stopped
    calibration goes on where it was.
    """
    settings = study.arms[name].match_noise
    assert settings is not None
    path = calibration_of(out, name)
    record: dict[str, Any] = read_json(path) or {"settings": settings.model_dump(mode="json"), "rounds": []}
    if "target" not in record:
        record["target"] = total_variation(load(run_of(out, settings.target)), settings.users)
        write_json(path, record)
    target, rounds = record["target"], record["rounds"]

    for number in range(1, settings.rounds + 1):
        if len(rounds) < number:
            source = round_of(out, name, number - 1) if number > 1 else run_of(out, settings.weights)
            trained = load(source)

            def variation(noise: float, trained: Trained = trained) -> float:
                return total_variation(under(trained, study.config(name, noise).model), settings.users)

            noise, expected = find_noise(variation, target)
            found_on = f"round {number - 1}" if number > 1 else settings.weights
            rounds.append(vars(_Round(noise, found_on, expected)))
            write_json(path, record)
        this = rounds[number - 1]
        if this["after_training"] is None:
            run = round_of(out, name, number)
            complete(study.config(name, this["noise"]), run)
            this["after_training"] = total_variation(load(run), settings.users)
            write_json(path, record)
        print(
            f"round {number}: sigma {this['noise']:.4g}, total variation {this['after_training']:.4f} after training, "
            f"target {target:.4f}",
            flush=True,
        )
        if abs(this["after_training"] / target - 1) <= settings.tolerance:
            break
    distances = [abs(one["after_training"] / target - 1) for one in rounds]
    kept = min(range(len(rounds)), key=distances.__getitem__)
    record |= {"kept_round": kept + 1, "noise": rounds[kept]["noise"], "matched": distances[kept] <= settings.tolerance}
    write_json(path, record)
    return round_of(out, name, kept + 1)
