"""What a run is: one strict, typed configuration, read from YAML and `key=value` overrides and checked before any
process starts.

`load(path, overrides)` is the way in. An unknown key is an error that names the nearest known one; a combination that
cannot work is refused here, with the reason, so that no worker ever meets it. Nothing in this module imports torch.
"""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError, model_validator

from data_pipeline.errors import GenattError
from genatt_dist.attention.options import (
    Attention,
    DecodedAttention,
    DiffusionAttention,
    DotProductAttention,
    HybridAttention,
    RecurrentAttention,
    VariationalAttention,
)
from genatt_dist.embedding.feature_options import Feature
from genatt_dist.embedding.options import TableConfig
from genatt_dist.evaluation.options import EvaluationConfig
from genatt_dist.launch.options import RayOptions
from genatt_dist.loss.options import LossConfig
from genatt_dist.section import Section
from genatt_dist.training.options import TrainingConfig

PREFETCH_BYTES = 256 << 20
# What embedding/summed.py has of a sharded table's optimizers.
SUMMED_OPTIMIZERS = ("rowwise_adagrad", "adagrad", "sgd")
INFERENCE = ("inference", "mc_samples", "sampling_steps", "eta", "sample_blocks")


class DataConfig(Section):
    """Where the sequence shards lie and how histories are cut from them."""

    path: str = Field(description="Directory or fsspec URL that `genatt prepare` published.")
    max_len: int = Field(50, ge=1, le=4096, description="n: positions a history may have.")
    windows: Literal["last", "all"] = Field(
        "last", description="Train on the last max_len+1 items of a user, or on all windows of that length."
    )
    targets: Literal["all", "last"] = Field(
        "all", description="Predict every next item of a window, or only its last one."
    )
    shuffle_windows: int = Field(
        65_536,
        ge=1,
        description="Windows shuffled together, at least, where there are more; fewer are shuffled as a whole.",
    )
    feed: Literal["loader", "ray"] = Field(
        "loader",
        description="What reads the shards: the ranks, or Ray Data (launcher=ray only; its order is its own, so that a "
        "run resumes at epochs' ends only).",
    )
    prefetch_bytes: int = Field(
        PREFETCH_BYTES,
        ge=1 << 16,
        description="Items of row groups that a rank keeps or reads ahead; a data set that fits is read once.",
    )


class ModelConfig(Section):
    """The dense model between item rows and states (MATH §2)."""

    hidden_size: int = Field(64, ge=1, description="d")
    num_blocks: int = Field(2, ge=1, description="L")
    num_heads: int = Field(1, ge=1, description="H")
    dropout: float = Field(0.2, ge=0, lt=1)
    attention: Attention = DotProductAttention()
    share_map: bool = Field(False, description="The first block's map serves all blocks, each with values of its own.")

    @property
    def decoded(self) -> DecodedAttention | None:
        """What decodes maps from the encoder's states, also inside a hybrid; None where nothing does."""
        attention = self.attention.generator if isinstance(self.attention, HybridAttention) else self.attention
        return attention if isinstance(attention, DecodedAttention) else None

    @property
    def encoded(self) -> bool:
        """Whether the attention reads the states of the sequence encoder."""
        return self.decoded is not None or isinstance(self.attention, RecurrentAttention)

    @property
    def generative(self) -> VariationalAttention | DiffusionAttention | None:
        """The generative attention, also inside a hybrid; None for the others."""
        decoded = self.decoded
        return decoded if isinstance(decoded, VariationalAttention | DiffusionAttention) else None

    @model_validator(mode="after")
    def _possible(self) -> ModelConfig:
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} is not a multiple of num_heads={self.num_heads}: heads "
                "share the width equally"
            )
        if self.share_map and isinstance(self.attention, RecurrentAttention):
            raise ValueError("share_map=true with attention.type=gru: there is no map to share; set share_map=false")
        return self


class RunConfig(Section):
    """One training run."""

    data: DataConfig
    model: ModelConfig = ModelConfig()
    table: TableConfig = TableConfig()
    features: tuple[Feature, ...] = Field((), description="Tables beside the items': attributes, and context.")
    loss: LossConfig = LossConfig()
    training: TrainingConfig = TrainingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    world_size: int = Field(1, ge=1, description="Ranks of the run.")
    ray: RayOptions = RayOptions()

    @property
    def table_learning_rate(self) -> float:
        return self.table.learning_rate or self.training.learning_rate

    @model_validator(mode="after")
    def _possible(self) -> RunConfig:
        decoded, sharded = self.model.decoded, self.table.kind == "sharded"
        names = [feature.name for feature in self.features]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"features has name={twice[0]} twice: give one of them another name")
        if not sharded and (apart := [feature.name for feature in self.features if feature.sharded]):
            raise ValueError(
                f"features.{apart[0]}.table=sharded with table.kind=replicated: sharded tables are looked up together "
                "with the items'; set table.kind=sharded, or leave the feature replicated"
            )
        if sharded and self.loss.kind == "full":
            _scored_whole(self.table)
        if sharded and self.loss.kind != "full" and self.training.accumulation_steps > 1:
            raise ValueError(
                f"table.kind=sharded with loss.kind={self.loss.kind} and training.accumulation_steps > 1: the fused "
                "table optimizer updates rows inside every backward, so the micro-batches would be separate updates; "
                "raise training.batch_sequences instead, or use loss.kind=full"
            )
        if not sharded and self.table.learning_rate is not None:
            raise ValueError(
                "table.learning_rate with table.kind=replicated: a replicated table shares the dense optimizer; "
                "set training.learning_rate, or table.kind=sharded"
            )
        if self.data.feed == "ray" and self.training.checkpoint_every is not None:
            raise ValueError(
                f"training.checkpoint_every={self.training.checkpoint_every} with data.feed=ray: Ray Data's order has "
                "no place to go on from inside an epoch; drop it (a checkpoint is written after each evaluation, see "
                "training.evaluate_every), or use data.feed=loader"
            )
        if self.training.precision == "bf16" and self.training.zero_stage == 0:
            raise ValueError(
                "training.precision=bf16 with training.zero_stage=0: without ZeRO, DeepSpeed's bf16 drifts from fp32 "
                "with AdamW; use training.zero_stage=1"
            )
        if decoded is not None and decoded.condition == "last" and self.data.targets != "last":
            place = "attention.generator" if isinstance(self.model.attention, HybridAttention) else "attention"
            raise ValueError(
                f"model.{place}.condition=last with data.targets=all: the last state has seen the targets of all "
                "earlier positions; use condition=prefix, or data.targets=last"
            )
        return self


def _scored_whole(table: TableConfig) -> None:
    """Raise ValueError where the one update of a sharded table under the full softmax (embedding/summed.py) lacks what
    the fused kernels have.
    """
    if table.optimizer not in SUMMED_OPTIMIZERS:
        raise ValueError(
            f"table.optimizer={table.optimizer} with table.kind=sharded and loss.kind=full: lookups and scores are "
            f"summed before an update that is {', '.join(SUMMED_OPTIMIZERS)} only; use one of them, or "
            "loss.kind=sampled"
        )
    for name in ("weight_decay", "max_norm", "managed_collision"):
        if getattr(table, name):
            raise ValueError(
                f"table.{name} with table.kind=sharded and loss.kind=full: the update that sums lookups and scores "
                f"does without it; drop table.{name}, or use loss.kind=sampled"
            )


def load(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file, apply `section.key=value` overrides (values are YAML) and check the whole.

    Raises GenattError: missing file, bad YAML, unknown key (with the nearest name), bad value, impossible combination.
    """
    path = Path(path)
    try:
        text = path.read_text()
    except OSError as error:
        raise GenattError(
            f"cannot read config {path}: {error.strerror}; name an existing YAML file, for example from configs/"
        ) from None
    except UnicodeDecodeError:
        raise GenattError(f"config {path} is not a text file in UTF-8: name a YAML file") from None
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise GenattError(f"config {path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise GenattError(f"config {path} holds {type(tree).__name__}, not sections such as `data:` and `model:`")
    for override in overrides:
        apply(tree, override)
    return parse(tree, str(path))


def parse(tree: dict[str, Any], where: str) -> RunConfig:
    """Check a tree of plain values; `where` names its origin in errors."""
    if isinstance(tree.get("train"), dict):
        raise GenattError(
            f"config {where} is a pipeline's: submit it (`genatt submit pipeline`), or train on its section train alone"
        )
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        raise GenattError(f"config {where}: " + "; ".join(_explain(item) for item in error.errors())) from None


def for_inference(config: RunConfig, changes: Sequence[str]) -> RunConfig:
    """The configuration with other choices of inference: `sampling_steps=10`, `inference=mc` and what else the
    attention has. No trained weight depends on them.

    Raises GenattError: another key, a bad value.
    """
    hybrid = isinstance(config.model.attention, HybridAttention)
    section = (
        config.model.attention.generator
        if isinstance(config.model.attention, HybridAttention)
        else config.model.attention
    )
    choices = [name for name in INFERENCE if name in type(section).model_fields]
    tree = config.model_dump(mode="json")
    for change in changes:
        name = change.partition("=")[0]
        if name not in choices:
            known = f"it has {', '.join(choices)}" if choices else "it has none"
            raise GenattError(f"{change} is no choice of inference of attention type {section.type}: {known}")
        apply(tree, f"model.attention.{'generator.' if hybrid else ''}{change}")
    return parse(tree, "for inference")


def dump(config: RunConfig) -> str:
    """The resolved configuration as YAML; `load` of it gives an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def apply(tree: dict[str, Any], override: str) -> None:
    """Set `section.key=value` in a tree of plain values; sections that are missing appear."""
    key, separator, value = override.partition("=")
    if not separator or not key:
        raise GenattError(f"override {override!r} is not of the form section.key=value, for example training.epochs=3")
    *parents, leaf = key.split(".")
    node = tree
    for name in parents:
        if node.get(name) is None:
            node[name] = {}  # `model:` with nothing under it is an empty section
        child = node[name]
        if not isinstance(child, dict):
            raise GenattError(f"override {override!r}: {name} is the value {child!r}, not a section")
        node = child
    try:
        node[leaf] = yaml.safe_load(value)
    except yaml.YAMLError:
        raise GenattError(f"override {override!r}: the value is not valid YAML; quote it") from None


def _explain(error: Any) -> str:
    """One of pydantic's errors as: where, what was there, what may be there."""
    location = error["loc"]
    dotted = ".".join(str(part) for part in _keys(location))
    if error["type"] == "extra_forbidden":
        names = sorted(_fields(location[:-1]))
        near = difflib.get_close_matches(str(location[-1]), names, n=1, cutoff=0.4)
        section = "".join(f"{part}." for part in _keys(location)[:-1])
        hint = f"did you mean {section}{near[0]}?" if near else f"known: {', '.join(names)}"
        return f"unknown key {dotted}: {hint}"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error":
        return f"{dotted}: {message}" if dotted else message
    if error["type"] in ("union_tag_invalid", "union_tag_not_found"):
        given, known = error["input"].get("type"), _tags(location[-1])
        near = difflib.get_close_matches(str(given), known, n=1)
        wrong = f"{dotted}.type={given} is unknown" if given else f"{dotted}.type is missing"
        return f"{wrong}: {f'did you mean {near[0]}? ' if near else ''}use {', '.join(known)}"
    if error["type"] == "missing":
        return f"{dotted} is missing: set it in the file or give {dotted}=VALUE"
    return f"{dotted}={error['input']!r}: {message[:1].lower()}{message[1:]}"


def _keys(location: Sequence[Any]) -> list[Any]:
    """A location as the user wrote it: without the tag that pydantic puts after the name of a union."""
    return [part for before, part in zip((None, *location), location, strict=False) if part not in _tags(before)]


def _tags(field: Any) -> list[str]:
    """The types a union of sections may have: `attention`, `generator` inside a hybrid, and each of `features`."""
    unions: dict[Any, Any] = {
        "attention": Attention,
        "generator": HybridAttention.model_fields["generator"].annotation,
    }
    union = Feature if isinstance(field, int) else unions.get(field)  # the place in a list: only features is one
    return [kind.model_fields["type"].default for kind in _sections(union)]


def _fields(location: Sequence[Any]) -> set[str]:
    """Names of the fields a section may have, following a location of pydantic's (a union's location names its tag)."""
    kinds: list[Any] = [RunConfig]
    for part in location:
        following: list[Any] = []
        for kind in kinds:
            if isinstance(part, int):
                following.append(kind)
            elif part in kind.model_fields:
                following += _sections(kind.model_fields[part].annotation)
            elif kind.model_fields.get("type") is not None and kind.model_fields["type"].default == part:
                following.append(kind)
        kinds = following
    return {name for kind in kinds for name in kind.model_fields}


def _sections(annotation: Any) -> list[Any]:
    if typing.get_origin(annotation) in (types.UnionType, typing.Union, Annotated, tuple):
        return [section for argument in typing.get_args(annotation) for section in _sections(argument)]
    return [annotation] if isinstance(annotation, type) and issubclass(annotation, Section) else []
