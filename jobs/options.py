"""What a job is told: the configuration of each kind, strict as the others. Nothing here imports torch or Ray."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from data_pipeline.config import PATHS, PrepareConfig
from data_pipeline.errors import GenattError
from data_pipeline.redaction import redact
from genatt_dist import config as configuration
from genatt_dist.config import RunConfig
from genatt_dist.section import Section

_Model = TypeVar("_Model", bound=BaseModel)
OUT = "$OUT"
KINDS = ("prepare", "train", "evaluate", "benchmark", "pipeline")


class OnNode(Section):
    """What is done on one node."""

    cpus: float = Field(1.0, ge=0, description="CPUs that it reserves on a node.")
    gpus: float | None = Field(None, ge=0, description="GPUs it reserves; default: 1 where the cluster has one.")
    limit_seconds: float = Field(6 * 3600.0, gt=0, description="Time limit, waiting for a node included.")


class EvaluateStage(OnNode):
    """Which splits are ranked with the best checkpoint, and how."""

    splits: tuple[Literal["valid", "test"], ...] = Field(("test",), min_length=1)
    inference: tuple[str, ...] = Field((), description="Other choices than the run's, as sampling_steps=10.")
    categories: tuple[str, ...] = Field((), description="Rank items of these categories alone.")

    @field_validator("inference")
    @classmethod
    def _pairs(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        for value in values:
            if not all(value.partition("=")):
                raise ValueError(f"{value!r} is not of the form KEY=VALUE, as sampling_steps=10")
        return values


class ReportStage(Section):
    """One page of the run, report.html, beside report.json."""

    out: str | None = Field(None, min_length=1, description="Directory or fsspec URL; default: report/ in the run.")


class BenchmarkJob(OnNode):
    """`genatt bench NAME` on a node of the cluster; what it writes goes to --run."""

    name: str = Field(description="What `genatt bench` calls it: steps, scaling.")
    out: str = Field("results.json", pattern=r"^[\w.-]+$", description="Name of its file of results.")
    options: dict[str, Any] = Field(
        {},
        description=f"Options of the verb: {{quick: true, ranks: '1,2', select: [a=b]}}; {OUT} in one is a directory "
        "whose files go to --run.",
    )

    @model_validator(mode="before")
    @classmethod
    def _ranks_reserve(cls, tree: Any) -> Any:
        """Ranks that Ray starts reserve what they use; what only waits for them takes no room of theirs."""
        options = tree.get("options") if isinstance(tree, Mapping) else None
        waits = isinstance(options, Mapping) and options.get("launcher") == "ray"
        return {"cpus": 0.0, "gpus": 0.0, **tree} if waits else tree

    def arguments(self) -> list[str]:
        """The options as the command line has them."""
        words: list[str] = []
        for name, value in self.options.items():
            option = f"--{name.replace('_', '-')}"
            for one in value if isinstance(value, list) else [value]:
                if one is not False and one is not None:
                    words += [option] if one is True else [option, str(one)]
        return words


class Pipeline(Section):
    """prepare → train → evaluate → report. Without `prepare` the shards of train.data.path are there already."""

    prepare: PrepareConfig | None = None
    train: RunConfig
    evaluate: EvaluateStage | None = EvaluateStage()
    report: ReportStage | None = ReportStage()

    @model_validator(mode="after")
    def _possible(self) -> Pipeline:
        if self.report is not None:
            plain = self.evaluate is not None and not self.evaluate.inference and not self.evaluate.categories
            if not plain or "test" not in (self.evaluate.splits if self.evaluate else ()):
                raise ValueError(
                    "report needs an evaluation on test with the run's own inference and all categories: mend "
                    "evaluate, or set report: null"
                )
        return self


def check_kind(kind: str) -> None:
    """Raises GenattError where there is no such job."""
    if kind not in KINDS:
        raise GenattError(f"job {kind} is unknown: use {', '.join(KINDS)}")


def load(kind: str, path: Path | None, overrides: Sequence[str], run: str) -> dict[str, Any]:
    """The resolved configuration of a job of this kind, as plain values; `of_*` below read it again on the cluster.

    path: YAML file; None where the overrides say it all. run: directory or URL, where outputs lie by default. Local
    paths become absolute: a job has another working directory. Raises GenattError naming key, value, place and mend.
    """
    tree = {} if path is None else _read(path)
    for override in overrides:
        configuration.apply(tree, override)
    where = "of overrides" if path is None else str(path)
    if kind == "prepare":
        return _dumped_preparation(of_prepare(_with_paths(tree | {"out": tree.get("out", run)}, PATHS), where))
    if kind == "train":
        return _of_run(configuration.parse(_with_data(tree), where))
    if kind == "evaluate":
        return of_evaluate(tree, where).model_dump(mode="json")
    if kind == "benchmark":
        return of_benchmark(tree, where).model_dump(mode="json")
    pipeline = of_pipeline(_joined(tree, run, where), where)
    return {
        "prepare": pipeline.prepare and _dumped_preparation(pipeline.prepare),
        "train": _of_run(pipeline.train),
        "evaluate": pipeline.evaluate and pipeline.evaluate.model_dump(mode="json"),
        "report": pipeline.report and pipeline.report.model_dump(mode="json"),
    }


def of_prepare(tree: Mapping[str, Any], where: str = "of the job") -> PrepareConfig:
    """A preparation. Raises GenattError."""
    return _checked(PrepareConfig, tree, where)


def of_evaluate(tree: Mapping[str, Any], where: str = "of the job") -> EvaluateStage:
    """An evaluation. Raises GenattError."""
    return _checked(EvaluateStage, tree, where)


def of_benchmark(tree: Mapping[str, Any], where: str = "of the job") -> BenchmarkJob:
    """A benchmark. Raises GenattError."""
    return _checked(BenchmarkJob, tree, where)


def of_pipeline(tree: Mapping[str, Any], where: str = "of the job") -> Pipeline:
    """A pipeline, each section checked by its own kind. Raises GenattError."""
    _check_keys(Pipeline, tree, where)
    parts = dict(tree)
    if parts.get("prepare") is not None:
        parts["prepare"] = _checked(PrepareConfig, parts["prepare"], where, "prepare.")
    parts["train"] = configuration.parse(dict(_mapping(parts.get("train"), where, "train")), f"{where}, section train")
    for name, model in (("evaluate", EvaluateStage), ("report", ReportStage)):
        if parts.get(name) is not None:
            parts[name] = _checked(model, parts[name], where, f"{name}.")
    return _checked(Pipeline, parts, where)


def _joined(tree: dict[str, Any], run: str, where: str) -> dict[str, Any]:
    """A pipeline's sections with the defaults that one takes from another: where the shards lie."""
    _check_keys(Pipeline, tree, where)
    train = dict(_mapping(tree.get("train"), where, "train"))
    if tree.get("prepare") is None:
        return tree | {"train": _with_data(train)}
    prepare = dict(_mapping(tree["prepare"], where, "prepare"))
    prepare = _with_paths(prepare | {"out": prepare.get("out", f"{run.rstrip('/')}-shards")}, PATHS)
    train = _with_data(train)
    data = dict(_mapping(train.get("data", {}), where, "train.data"))
    if (path := data.get("path", prepare["out"])) != prepare["out"]:
        raise GenattError(
            f"config {where}: train.data.path={path} is not prepare.out={prepare['out']}: leave train.data.path out, "
            "or drop the section prepare"
        )
    return tree | {"prepare": prepare, "train": train | {"data": data | {"path": prepare["out"]}}}


def absolute(path: str) -> str:
    """A local path from the root on; URLs, names of known sets and of what is not here stay."""
    return str(Path(path).absolute()) if "://" not in path else path


def _with_paths(tree: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Local paths under these keys made absolute. A source that is not here may be a known set's name."""
    found = {name: tree[name] for name in names if isinstance(tree.get(name), str) and tree[name]}
    return tree | {name: absolute(path) for name, path in found.items() if name == "out" or Path(path).exists()}


def _with_data(tree: dict[str, Any]) -> dict[str, Any]:
    data = tree.get("data")
    if not isinstance(data, dict) or not isinstance(data.get("path"), str):
        return tree
    return tree | {"data": data | {"path": absolute(data["path"])}}


def _of_run(config: RunConfig) -> dict[str, Any]:
    return config.model_dump(mode="json")


def _dumped_preparation(config: PrepareConfig) -> dict[str, Any]:
    """Only what was set: with `append_to` the rest comes from the parent."""
    return config.model_dump(mode="json", exclude_unset=True)


def _read(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(path.read_text())
    except OSError as error:
        raise GenattError(
            f"cannot read config {path}: {error.strerror}; name an existing YAML file, for example from configs/"
        ) from None
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise GenattError(f"config {path} is not valid YAML: {' '.join(str(error).split())}") from None
    return dict(_mapping(tree, str(path), "the file"))


def _mapping(tree: Any, where: str, what: str) -> Mapping[str, Any]:
    if not isinstance(tree, dict):
        held = "is missing" if tree is None else f"holds {type(tree).__name__}, not keys"
        raise GenattError(f"config {where}: {what} {held}: see configs/pipeline.yaml")
    return tree


def _check_keys(model: type[BaseModel], tree: Mapping[str, Any], where: str, section: str = "") -> None:
    for key in tree:
        if key not in model.model_fields:
            near = difflib.get_close_matches(str(key), model.model_fields, n=1, cutoff=0.4)
            hint = f"did you mean {section}{near[0]}?" if near else f"known: {', '.join(model.model_fields)}"
            raise GenattError(f"config {where}: unknown key {section}{key}: {hint}")


def _checked(model: type[_Model], tree: Any, where: str, section: str = "") -> _Model:
    tree = _mapping(tree, where, section.rstrip(".") or "the file")
    _check_keys(model, tree, where, section)
    try:
        return model.model_validate(dict(tree))
    except ValidationError as error:
        found = error.errors()[0]
    name = section + ".".join(map(str, found["loc"]))
    message = found["msg"].removeprefix("Value error, ")
    if found["type"] == "missing":
        raise GenattError(f"config {where}: {name} is missing: set it in the file or give {name}=VALUE")
    if not found["loc"]:
        raise GenattError(f"config {where}: {message}")
    value = redact(found["input"]) if isinstance(found["input"], str) else found["input"]
    raise GenattError(f"config {where}: {name}={value!r}: {message[:1].lower()}{message[1:]}")
