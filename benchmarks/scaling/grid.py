"""What is measured, from one strict configuration, and which rows the cost model is fitted to.

A cell is one model on one table; it is measured on 1 … R ranks by turns. Weak scaling keeps the sequences of a rank,
strong scaling those of the global batch. Beside them stand as many processes at once that share nothing but the machine
(`independent`): no way to spread ranks over its cores can be faster than they are.

Nothing here imports torch: what a user asks is checked before any process starts.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from data_pipeline.errors import GenattError
from genatt_dist import config as configuration
from genatt_dist.config import RunConfig
from genatt_dist.section import Section

Mode = Literal["weak", "strong"]
Kind = Literal["replicated", "sharded"]
# The honest split, fixed here before anything runs: a row is fitted to only if it is in none of these, of one rank
# alone or of independent ones, and its batch is not the larger one of strong scaling; none of several ranks is.
HELD_OUT_STEPS = (10, 200)
NOTHING = "none"  # an empty list, on the command line
HELD_OUT_ITEMS = (30_000, 100_000)


class Cell(Section):
    """What rows must share to be compared. steps: T, None for dot product."""

    attention: Literal["dot_product", "diffusion"] = "dot_product"
    steps: int | None = Field(None, ge=1)
    items: int = Field(10_000, ge=10)
    table: Kind = "replicated"
    loss: Literal["sampled", "full"] = "sampled"
    max_len: int = Field(50, ge=2)
    width: int = Field(64, ge=1)

    @property
    def label(self) -> str:
        """In a few words, for progress and figures."""
        name = "dot product" if self.steps is None else f"D-GenAtt T={self.steps}"
        return f"{name}, {self.items:,} items, {self.table}, {self.loss} softmax"


class Spec(Cell):
    """One row before it is measured. batch: sequences of a process group's global batch. independent: `ranks` groups
    of one rank each at the same time, each with `batch` sequences.
    """

    ranks: int = Field(1, ge=1)
    batch: int = Field(64, ge=1)
    independent: bool = False

    @property
    def cell(self) -> Cell:
        return Cell(**{name: getattr(self, name) for name in Cell.model_fields})

    @property
    def world_size(self) -> int:
        """Of one of its process groups."""
        return 1 if self.independent else self.ranks

    @property
    def tokens(self) -> int:
        """Of one step of all its ranks."""
        return self.batch * self.max_len * (self.ranks if self.independent else 1)

    @property
    def config(self) -> RunConfig:
        """The product's configuration of one group; what is not named is its default."""
        attention: dict[str, Any] = {"type": self.attention}
        if self.steps is not None:
            attention |= {"diffusion_steps": self.steps, "sampling_steps": min(4, self.steps)}
        tree = {
            "data": {"path": "in memory", "max_len": self.max_len},
            "model": {"hidden_size": self.width, "attention": attention},
            "table": {"kind": self.table},
            "loss": {"kind": self.loss},
            "training": {"batch_sequences": self.batch},
            "world_size": self.world_size,
        }
        return configuration.parse(tree, f"of the benchmark's row {self.label}")


class ScalingConfig(Section):
    """`genatt bench scaling`: extents of the grid and how carefully it is measured."""

    ranks: tuple[int, ...] = (1, 2)
    steps: tuple[int, ...] = Field((1, 10, 50, 200), description="T; dot product stands beside them in any case.")
    items: tuple[int, ...] = Field((10_000, 100_000, 1_000_000), description="Catalogues under the sampled softmax.")
    full_items: tuple[int, ...] = Field((10_000, 30_000), description="Catalogues under the full softmax.")
    few_steps: tuple[int, ...] = Field((50,), description="T under the full softmax, and from few_from items on.")
    few_from: int = Field(1_000_000, ge=1, description="Items of a catalogue whose steps are long: few T there.")
    tables: tuple[Kind, ...] = ("replicated", "sharded")
    mode: tuple[Mode, ...] = ("weak", "strong")
    batch: int = Field(64, ge=1, description="Sequences of a rank, of max_len positions each.")
    max_len: int = Field(50, ge=2)
    width: int = Field(64, ge=1)
    select: tuple[str, ...] = Field((), description="field=value[,value] of cells: only these.")
    launcher: Literal["torchrun", "deepspeed", "ray"] = "torchrun"
    start_seconds: float = Field(
        300.0, gt=0, description="Until launcher=ray has room for the ranks, nodes that are on their way up included."
    )
    rounds: int = Field(5, ge=1, description="Turns of every row.")
    warmup: int = Field(3, ge=1, description="Steps before the first turn.")
    turn_seconds: float = Field(0.3, gt=0, description="A turn is as many steps as fit, at least one.")
    row_seconds: float = Field(120.0, gt=0, description="A row that takes longer to answer is a row of time_limit.")
    memory_mb: int | None = Field(None, ge=1, description="MiB of a rank; default: most that is free, shared out.")

    @field_validator("ranks", "steps", "items", "full_items", "few_steps", mode="before")
    @classmethod
    def _numbers(cls, value: object) -> object:
        if isinstance(value, str):
            value = [word.strip() for word in value.split(",") if word.strip() not in ("", NOTHING)]
        if not isinstance(value, list | tuple) or not all(str(one).isdecimal() and int(one) >= 1 for one in value):
            raise ValueError("give whole numbers from 1 with commas, for example 1,2")
        return tuple(sorted({int(one) for one in value}))

    @field_validator("mode", "tables", mode="before")
    @classmethod
    def _words(cls, value: object) -> object:
        return tuple(word.strip() for word in value.split(",")) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _possible(self) -> ScalingConfig:
        if 1 not in self.ranks:
            raise ValueError(f"ranks={','.join(map(str, self.ranks))}: ratios are over one rank; add 1")
        return self

    @property
    def cells(self) -> list[Cell]:
        """Every cell that `select` lets through. Raises GenattError for a filter that names nothing."""
        return select(list(self._cells()), self.select)

    def _cells(self) -> Iterator[Cell]:
        for loss, catalogues in (("sampled", self.items), ("full", self.full_items)):
            for items in catalogues:
                some = self.few_steps if loss == "full" or items >= self.few_from else self.steps
                for table in self.tables:
                    for steps in (None, *some):
                        yield Cell(
                            attention="dot_product" if steps is None else "diffusion",
                            steps=steps,
                            items=items,
                            table=table,
                            loss=loss,  # type: ignore[arg-type]
                            max_len=self.max_len,
                            width=self.width,
                        )

    def rows(self, cell: Cell) -> list[Spec]:
        """The rows of a cell, each once: one rank first."""
        given, most = cell.model_dump(), max(self.ranks)
        found = [Spec(**given, ranks=1, batch=self.batch)]
        for ranks in self.ranks:
            if ranks > 1:
                found.append(Spec(**given, ranks=ranks, batch=self.batch, independent=True))
            if "weak" in self.mode:
                found.append(Spec(**given, ranks=ranks, batch=self.batch * ranks))
            if "strong" in self.mode:
                found.append(Spec(**given, ranks=ranks, batch=self.batch * most))
        if not (cell.steps in HELD_OUT_STEPS or cell.items in HELD_OUT_ITEMS):
            # Short steps, so that the model can tell what a step costs by itself from what its tokens cost.
            few = max(1, self.batch // 4)
            found.append(Spec(**given, ranks=1, batch=few))
            found += [Spec(**given, ranks=ranks, batch=few, independent=True) for ranks in self.ranks if ranks > 1]
        return list(dict.fromkeys(found))


QUICK: dict[str, Any] = {
    "steps": (50,),
    "items": (10_000,),
    "full_items": (),
    "batch": 16,
    "rounds": 3,
    "turn_seconds": 0.1,
}


def held_out(spec: Spec, batch: int) -> bool:
    """Whether the cost model is not fitted to this row. batch: of a rank under weak scaling."""
    return spec.world_size > 1 or spec.batch > batch or spec.steps in HELD_OUT_STEPS or spec.items in HELD_OUT_ITEMS


def read(path: Path | None, given: dict[str, Any]) -> ScalingConfig:
    """The configuration of a YAML file (or the defaults) with what `given` has beside it.

    Raises GenattError: no such file, an unknown key (with the nearest name), a bad value.
    """
    tree: Any = {}
    if path is not None:
        try:
            tree = yaml.safe_load(path.read_text()) or {}
        except OSError as error:
            raise GenattError(f"cannot read {path}: {error.strerror}; name a YAML file") from None
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise GenattError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
        if not isinstance(tree, dict):
            raise GenattError(f"{path} holds {type(tree).__name__}, not keys such as `ranks:` and `items:`")
    try:
        return ScalingConfig.model_validate(tree | given)
    except ValidationError as error:
        raise GenattError(f"{path or 'bench scaling'}: {_explained(error.errors())}") from None


def select(cells: Sequence[Cell], filters: Sequence[str]) -> list[Cell]:
    """The cells that every `field=value[,value…]` lets through. Raises GenattError for what names nothing."""
    kept = list(cells)
    for text in filters:
        name, _, values = text.partition("=")
        if name not in Cell.model_fields:
            raise GenattError(f"--select {text}: unknown field {name!r}: {_near(name, list(Cell.model_fields))}")
        wanted = {value.strip().lower() for value in values.split(",")}
        there = {_text(getattr(cell, name)) for cell in cells}
        if missing := sorted(wanted - there):
            raise GenattError(
                f"--select {text}: no cell of the grid has {name}={','.join(missing)}: use {', '.join(sorted(there))}"
            )
        kept = [cell for cell in kept if _text(getattr(cell, name)) in wanted]
    if not kept:
        raise GenattError(f"--select {' --select '.join(filters)} leaves nothing to measure: drop one of them")
    return kept


def _text(value: object) -> str:
    return str(value).lower()


def _near(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"


def _explained(errors: Sequence[Any]) -> str:
    """All of them; the keys that nothing given is near to share one list of those there are."""
    known = list(ScalingConfig.model_fields)
    unknown = [str(error["loc"][0]) for error in errors if error["type"] == "extra_forbidden"]
    strange = [name for name in unknown if not difflib.get_close_matches(name, known)]
    said = [_explain(error) for error in errors if error["type"] != "extra_forbidden"]
    said += [f"unknown key {name}: {_near(name, known)}" for name in unknown if name not in strange]
    if strange:
        said.append(f"unknown key{'s' * (len(strange) > 1)} {', '.join(strange)}: known: {', '.join(known)}")
    return "; ".join(said)


def _explain(error: Any) -> str:
    name = ".".join(str(part) for part in error["loc"][:1])
    message = error["msg"].removeprefix("Value error, ")
    return f"{name}={error['input']!r}: {message[:1].lower()}{message[1:]}" if name else message
