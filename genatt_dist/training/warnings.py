"""Failure signs of MATH §8: which numbers of an evaluation say that a model is going wrong, and what mends it.

Each sign is told once a run. Fresh weights show most of them, so a sign must stand in two evaluations in a row, both
after the warm-up of γ and not before the second epoch; at the end of training one is enough. Only a number that is not
finite is told at once.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from genatt_dist.attention.options import (
    DecodedAttention,
    DiffusionAttention,
    HybridAttention,
    NoisyDotProductAttention,
    VariationalAttention,
)
from genatt_dist.config import ModelConfig, RunConfig

FIRST_EPOCH = 2
NOT_FINITE = "not finite"

Record = Mapping[str, Any]  # a line of metrics.jsonl: `{statistic}/block{l}` → number or list of numbers


@dataclass(frozen=True)
class FailureSign:
    """What one evaluation showed: `value` of the worst block against `threshold`; `text` is all of it in words."""

    name: str
    block: int
    value: float
    threshold: float
    text: str


@dataclass(frozen=True)
class _Rule:
    """A sign is there when `beyond(value, threshold)` for some block. reading: holds {value} and {threshold}."""

    name: str
    statistic: str
    beyond: Callable[[float, float], bool]
    threshold: float
    reading: str


# The same sign may have several rules; the first that holds is told.
_RULES = (
    _Rule(
        "posterior collapse",
        "kl_mean",
        operator.lt,
        0.01,
        "KL {value:.2g} nat per latent dimension, below {threshold}: the latent says nothing about the history",
    ),
    _Rule(
        "posterior collapse",
        "active_share",
        operator.lt,
        0.1,
        "{value:.0%} of the latent dimensions in use, below {threshold:.0%}: the latent says next to nothing",
    ),
    _Rule(
        "over-smoothing",
        "attention_entropy",
        operator.gt,
        0.98,
        "attention entropy {value:.3f} of the uniform map's, above {threshold}: the history is averaged, not attended",
    ),
    _Rule(
        "determinism",
        "total_variation",
        operator.lt,
        0.02,
        "total variation {value:.2g} between two sampled maps, below {threshold}: sampling changes nothing",
    ),
    _Rule(
        "pure noise",
        "between_users",
        operator.lt,
        0.1,
        "{value:.0%} of the maps' variance lies between users, below {threshold:.0%}: noise, not the history, makes "
        "the map",
    ),
    _Rule(
        "vanishing residual scale",
        "residual_scale",
        operator.lt,
        0.01,
        "residual scale {value:.2g}, below {threshold}: diffusion adds nothing to the mean map",
    ),
    # Both g_0 and m have RMS ≤ 1, and independent ones of RMS 1 lie √2 apart.
    _Rule(
        "exploding residual scale",
        "residual_scale",
        operator.gt,
        1.4,
        "residual scale {value:.2f}, above {threshold}: views of the map lie as far from their mean as unrelated ones",
    ),
    _Rule(
        "exploding kappa",
        "kappa",
        operator.gt,
        20.0,
        "kappa {value:.1f}, above {threshold:.0f}: rows of the map are nearly one-hot and their gradients vanish",
    ),
    _Rule(
        "negative kappa",
        "kappa",
        operator.lt,
        0.0,
        "kappa {value:.2g}, below {threshold:.0f}: the map prefers what its generator ranks lowest",
    ),
    # Refused when a configuration is read; a schedule of another program's checkpoint may still have it.
    _Rule(
        "signal at the end of diffusion",
        "alpha_bar_T",
        operator.ge,
        1e-3,
        "alpha_bar_T {value:.2g}, not below {threshold}: sampling starts from noise that training never saw",
    ),
    _Rule(
        "no signal at the end of diffusion",
        "alpha_bar_T",
        operator.le,
        0.0,
        "alpha_bar_T {value:.2g}, not above {threshold:.0f}: one step of sampling divides by its root",
    ),
)


class FailureSigns:
    """Watches the evaluations of one run and gives each sign once."""

    def __init__(self, config: RunConfig, total_steps: int, records: Iterable[Record] = ()) -> None:
        """records: what the run has logged so far (metrics.jsonl), so that a resumed run goes on where it stood."""
        generative = config.model.generative
        self._model, self._told = config.model, set[str]()
        self._before = set[str]()  # signs of the evaluation before
        self._first_step = generative.gamma_warmup * total_steps if generative else 0.0
        for record in records:
            if record.get("kind") == "warning":
                self._told.add(record["sign"])
            elif record.get("kind") == "valid":
                self.look(record, last=False, tell=False)

    def look(self, record: Record, last: bool, tell: bool = True) -> list[FailureSign]:
        """New signs in one evaluation's record (`epoch`, `step` and the statistics). last: training ends here."""
        settled = record["epoch"] >= FIRST_EPOCH and record["step"] >= self._first_step
        found = signs(self._model, record)
        due = [sign for sign in found if sign.name == NOT_FINITE or (settled and (last or sign.name in self._before))]
        self._before = {sign.name for sign in found} if settled else set()
        new = [sign for sign in due if sign.name not in self._told]
        if tell:
            self._told |= {sign.name for sign in new}
        return new


def signs(model: ModelConfig, record: Record) -> list[FailureSign]:
    """Every failure sign in one evaluation's statistics, each once, with its worst block."""
    numbers = _numbers(model, record)
    found = dict[str, FailureSign]()
    broken = [(name, block, value) for name, block, value in numbers if not math.isfinite(value)]
    if broken:
        name, block, value = broken[0]
        text = (
            f"{NOT_FINITE}: {name} is {value} in block {block}. Remedy: lower training.learning_rate, set "
            "training.gradient_clipping=1.0; or training.precision=fp32."
        )
        found[NOT_FINITE] = FailureSign(NOT_FINITE, block, value, math.inf, text)
    for rule in _RULES:
        beyond = [
            (abs(value - rule.threshold), block, value)
            for name, block, value in numbers
            if name == rule.statistic and math.isfinite(value) and rule.beyond(value, rule.threshold)
        ]
        if not beyond or rule.name in found:
            continue
        _, block, value = max(beyond)
        others = sorted({other for _, other, _ in beyond} - {block})
        also = f" (also in block {', '.join(map(str, others))})" if others else ""
        reading = rule.reading.format(value=value, threshold=rule.threshold)
        text = f"{rule.name} in block {block}{also}: {reading}. {_remedy(rule.name, model)}"
        found[rule.name] = FailureSign(rule.name, block, value, rule.threshold, text)
    return list(found.values())


def _numbers(model: ModelConfig, record: Record) -> list[tuple[str, int, float]]:
    """(statistic, block, value) of a record. κ head by head: their mean could hide one that went astray."""
    numbers = list[tuple[str, int, float]]()
    for key, value in record.items():
        name, separator, block = key.partition("/block")
        if not separator or not block.isdigit():
            continue
        if name == "kappa_per_head":
            numbers += [("kappa", int(block), head) for head in value]
        elif name == "active_units" and model.generative:
            numbers.append(("active_share", int(block), value / model.generative.latent_size))
        elif not isinstance(value, list):
            numbers.append((name, int(block), value))
    return numbers


def _remedy(sign: str, model: ModelConfig) -> str:
    """What to change, in the order to try it, with the values that are set now."""
    changes = list(_changes(sign, model))
    text = "; or ".join((", ".join(changes[:-1]), changes[-1]) if len(changes) > 1 else changes)
    return f"Remedy: {text}."


def _changes(sign: str, model: ModelConfig) -> Iterator[str]:
    section = "model.attention.generator" if isinstance(model.attention, HybridAttention) else "model.attention"
    decoded, generative = model.decoded, model.generative
    variational = generative if isinstance(generative, VariationalAttention) else None
    diffusion = generative if isinstance(generative, DiffusionAttention) else None

    def change(verb: str, option: str, of: DecodedAttention | NoisyDotProductAttention | None) -> str:
        return f"{verb} {section}.{option} (now {getattr(of, option)})"

    def unless(option: str, value: str) -> Iterator[str]:
        if decoded is not None and getattr(decoded, option) != value:
            yield f"set {section}.{option}={value}"

    match sign:
        case "posterior collapse":
            yield change("raise", "free_bits", generative)
            yield change("lower", "gamma", generative)
            yield change("lengthen", "gamma_warmup", generative)
            yield from unless("decoder_input", "latent")
            if variational:
                yield change("raise", "train_samples", variational)
        case "over-smoothing":
            if decoded and decoded.form == "factor" and not decoded.query_projection:
                yield f"set {section}.query_projection=true"
            if decoded and decoded.decoder_input == "states":
                yield f"set {section}.decoder_input=states_items"
            yield "raise training.learning_rate or training.epochs"
            yield f"lower model.num_blocks (now {model.num_blocks}) or model.dropout (now {model.dropout})"
        case "determinism":
            if isinstance(model.attention, NoisyDotProductAttention):
                yield change("raise", "noise", model.attention)
            if diffusion:
                yield change("raise", "sampling_steps", diffusion)
                yield change("raise", "eta", diffusion)
                yield change("lower", "rec_mix", diffusion)
            if variational:
                yield change("raise", "train_samples", variational)
            if generative:
                yield change("raise", "gamma", generative)
                yield from unless("decoder_input", "latent")
        case "pure noise":
            if isinstance(model.attention, NoisyDotProductAttention):
                yield change("lower", "noise", model.attention)
            if generative:
                yield from unless("decoder_input", "states_items")
                yield change("lower", "gamma", generative)
                yield change("raise", "free_bits", generative)
        case "vanishing residual scale":
            yield change("raise", "gamma", diffusion)
            yield from unless("decoder_input", "latent")
            yield change("lower", "rec_mix", diffusion)
        case "exploding residual scale":
            yield change("raise", "free_bits", diffusion)
            yield change("lower", "latent_weight", diffusion)
            yield "lower training.learning_rate"
        case "exploding kappa" | "negative kappa":
            yield "lower training.learning_rate"
            yield "set training.gradient_clipping=1.0"
            yield "raise training.weight_decay or training.warmup"
        case _:
            yield f"set {section}.schedule=linear"
