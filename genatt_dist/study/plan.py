"""What a study is: a base run, the arms that differ from it, and the comparisons made of them (strict, from one YAML).

Nothing here imports torch: a mistake in any arm is told before the first one starts.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from data_pipeline.errors import GenattError
from genatt_dist import config as configuration
from genatt_dist.config import RunConfig, Section
from genatt_dist.study.paths import RESERVED

NAME = r"[A-Za-z0-9][A-Za-z0-9_-]*"
_NOISE_TO_BE_FOUND = 1.0  # stands in where a configuration is only checked


class MatchNoise(Section):
    """How an arm finds its `model.attention.noise`: until its maps vary as much as those of `target`."""

    weights: str = Field(description="Arm whose trained weights the first sigma is found on.")
    target: str = Field(description="Arm whose total variation between two samples of a map is to be met.")
    tolerance: float = Field(0.1, gt=0, lt=1, description="Largest relative distance to the target after training.")
    rounds: int = Field(3, ge=1, description="Trainings at most; each later sigma is found on the one before.")
    users: int = Field(
        2048, ge=1, description="Validation users that the total variation is measured on, up to the end of a batch."
    )


class Arm(Section):
    """One model of the study: what it changes of the base run."""

    overrides: dict[str, Any] = Field({}, description="Sections as in a run's configuration.")
    match_noise: MatchNoise | None = None
    also_infer: dict[str, dict[str, Any]] = Field(
        {}, description="Name → changes of model.attention that the trained arm is evaluated under as well."
    )

    @property
    def needs(self) -> tuple[str, ...]:
        """Arms that must be finished before this one begins."""
        return (self.match_noise.weights, self.match_noise.target) if self.match_noise else ()


class Comparisons(Section):
    """Paired comparisons of the arms, in two families that have no test in common and that Holm's correction is
    applied to: every arm with the reference, and every claim with every control.
    """

    reference: str
    claims: tuple[str, ...] = ()
    controls: tuple[str, ...] | None = Field(
        None, description="Default: every arm that is neither the reference nor a claim."
    )
    metrics: tuple[str, ...] = Field(("ndcg@10", "recall@10", "mrr"), min_length=1)
    resamples: int = Field(10_000, ge=100)
    confidence: float = Field(0.95, gt=0, lt=1)
    seed: int = Field(0, ge=0)

    @field_validator("metrics")
    @classmethod
    def _known_metrics(cls, metrics: tuple[str, ...]) -> tuple[str, ...]:
        from genatt_dist.evaluation.statistics import check_metric

        for metric in metrics:
            try:
                check_metric(metric)
            except GenattError as error:
                raise ValueError(str(error)) from None
        return metrics


class Study(Section):
    """The whole plan. `base` is a run's configuration as plain values; `arms` are tried in the order given."""

    base: dict[str, Any]
    arms: dict[str, Arm] = Field(min_length=1)
    comparisons: Comparisons

    @model_validator(mode="after")
    def _consistent(self) -> Study:
        for name in self.arms:
            if not re.fullmatch(NAME, name):
                raise ValueError(f"arm {name!r} is no directory name: use letters, digits, _ and -")
            if name in RESERVED:
                raise ValueError(f"arm {name!r} has the name of a directory that the study keeps: choose another name")
        compared = self.comparisons
        named: dict[str, Sequence[str]] = {
            "comparisons.reference": [compared.reference],
            "comparisons.claims": compared.claims,
            "comparisons.controls": compared.controls or (),
        }
        named |= {f"arms.{name}.match_noise": arm.needs for name, arm in self.arms.items()}
        for where, names in named.items():
            for name in names:
                if name not in self.arms:
                    raise ValueError(f"{where} names {name!r}, which is no arm: use {', '.join(self.arms)}")
        roles = [compared.reference, *compared.claims, *(compared.controls or ())]
        for name in roles:
            if roles.count(name) > 1:
                raise ValueError(f"comparisons names {name!r} twice: an arm is the reference, a claim or a control")
        try:
            TopologicalSorter({name: arm.needs for name, arm in self.arms.items()}).prepare()
        except CycleError as error:
            raise ValueError(f"arms need each other in a circle: {' → '.join(error.args[1])}") from None
        return self

    @property
    def controls(self) -> tuple[str, ...]:
        """What the claims are held against beside the reference."""
        asked = self.comparisons
        if asked.controls is not None:
            return asked.controls
        return tuple(name for name in self.arms if name != asked.reference and name not in asked.claims)

    def config(self, name: str, noise: float | None = None) -> RunConfig:
        """The run of an arm; `noise` is the sigma that an arm with `match_noise` was given.

        Raises GenattError naming the arm and the key.
        """
        arm = self.arms[name]
        tree = merged(self.base, arm.overrides)
        if arm.match_noise:
            found = {"noise": _NOISE_TO_BE_FOUND if noise is None else noise}
            tree = merged(tree, {"model": {"attention": found}})
        config = configuration.parse(tree, f"of arm {name}")
        for other, attention in arm.also_infer.items():
            with_attention(config, attention, f"{name}.also_infer.{other}")
        return config


def with_attention(config: RunConfig, changes: dict[str, Any], name: str) -> RunConfig:
    """The run with changes of `model.attention`; `name` says in errors whose they are."""
    tree = config.model_dump(mode="json")
    return configuration.parse(merged(tree, {"model": {"attention": changes}}), f"of arm {name}")


def load(path: Path, overrides: Sequence[str] = ()) -> Study:
    """Read a study; `section.key=value` overrides change its base run, hence every arm that says nothing else.

    Raises GenattError: missing file, bad YAML, unknown key, an arm whose run is not possible.
    """
    try:
        tree = yaml.safe_load(path.read_text())
    except OSError as error:
        raise GenattError(f"cannot read study {path}: {error.strerror}; name an existing YAML file") from None
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise GenattError(f"study {path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise GenattError(f"study {path} holds {type(tree).__name__}, not the sections base, arms and comparisons")
    for override in overrides:
        if not isinstance(tree.get("base"), dict):
            break  # told below
        configuration.apply(tree["base"], override)
    try:
        study = Study.model_validate(tree)
    except ValidationError as error:
        raise GenattError(f"study {path}: " + "; ".join(_explain(item) for item in error.errors())) from None
    for name in study.arms:
        study.config(name)
    return study


def dump(study: Study) -> str:
    """The study as YAML; `load` of it gives an equal one."""
    return yaml.safe_dump(study.model_dump(mode="json"), sort_keys=False)


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """The base with the changes, section by section. Another `type` of a section drops what the base had in it."""
    result = copy.deepcopy(base)
    for key, value in changes.items():
        before = result.get(key)
        if (
            isinstance(value, dict)
            and isinstance(before, dict)
            and value.get("type", before.get("type")) == before.get("type")
        ):
            result[key] = merged(before, value)
        else:
            result[key] = copy.deepcopy(value)
    return result


def _explain(error: Any) -> str:
    where = ".".join(str(part) for part in error["loc"])
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "extra_forbidden":
        return f"unknown key {where}"
    if error["type"] == "missing":
        return f"{where} is missing"
    return f"{where}: {message}" if where else message
