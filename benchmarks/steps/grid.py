"""What is measured: every combination of attention, steps, lengths and work that the figures and the targets need.

Nothing here imports torch: the verb's options are checked before any process starts.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import product
from typing import NamedTuple

from benchmarks.steps import lengths
from data_pipeline.errors import GenattError

STEPS = (1, 2, 5, 10, 25, 50, 100, 200)  # T
SAMPLING_STEPS = (1, 2, 4, 10, 25, 50, 100, 200)  # S; 4 is the default of the models
MAX_LENS = (50, 100, 200)
FORMS = ("factor", "matrix")
REFERENCE_LEN = 50  # Batches are given for this max_len; longer histories come in proportionally smaller ones.


class Cell(NamedTuple):
    """What variants must share to be compared: each cell has its own dot product."""

    mode: str
    max_len: int
    lengths: str
    batch: int
    blocks: int
    softmax: bool


@dataclass(frozen=True)
class Variant:
    """One row of the result before it is measured.

    mode: `training` (one update) or `serving` (histories in, the ten best items out).
    sampler: one_step or unrolled in training, ddim in serving; None where nothing is denoised.
    steps: T in training, S in serving; None where nothing is denoised.
    batch: sequences (under Beauty's law of training, of a batch on average).
    softmax: whether the catalogue takes part: the full softmax of training, the ranking of all items in serving.
    sample_blocks: which blocks denoise in serving; None elsewhere.
    """

    mode: str
    attention: str
    form: str | None = None
    sampler: str | None = None
    steps: int | None = None
    max_len: int = 50
    batch: int = 256
    lengths: str = "all_n"
    softmax: bool = True
    blocks: int = 2
    sample_blocks: str | None = None

    @property
    def cell(self) -> Cell:
        return Cell(self.mode, self.max_len, self.lengths, self.batch, self.blocks, self.softmax)

    @property
    def label(self) -> str:
        """In a word or four, for the progress bar and notes."""
        parts = (self.attention, self.form, self.sampler, self.steps, self.sample_blocks)
        return f"{self.mode} n={self.max_len} {' '.join(str(part) for part in parts if part is not None)}"


@dataclass(frozen=True)
class Grid:
    """The extents of the grid. Batches are those at max_len 50.

    laws: of the lengths. Beauty's is measured at the first of max_lens only: one history in 176 is longer than 50, so
    that beyond nothing changes. few: the S of what stands beside the main serving rows; none, and it is left out.
    """

    steps: tuple[int, ...] = STEPS
    sampling_steps: tuple[int, ...] = SAMPLING_STEPS
    max_lens: tuple[int, ...] = MAX_LENS
    laws: tuple[str, ...] = lengths.LAWS
    training_batch: int = 256
    serving_batch: int = 1024
    few: tuple[int, ...] = (4, 50)

    def variants(self) -> list[Variant]:
        """All of it, cell by cell, the dot product of a cell first."""
        training = (self._training(cell) for cell in self._training_cells())
        serving = (self._serving(cell, steps) for cell, steps in self._serving_cells())
        return [variant for members in (*training, *serving) for variant in members]

    def _training_cells(self) -> Iterator[Cell]:
        for max_len, law, softmax in product(self.max_lens, self.laws, (True, False)):
            if law == "all_n" or max_len == self.max_lens[0]:
                yield Cell("training", max_len, law, scaled(self.training_batch, max_len), 2, softmax)

    def _training(self, cell: Cell) -> Iterator[Variant]:
        yield from _undenoised(cell)
        for form, sampler, steps in product(FORMS, ("one_step", "unrolled"), self.steps):
            yield Variant(**cell._asdict(), attention="diffusion", form=form, sampler=sampler, steps=steps)

    def _serving_cells(self) -> Iterator[tuple[Cell, tuple[int, ...]]]:
        """With the S of each. At the first max_len, beside what all have: one block, one user alone (whose latency
        grows with S), no ranking, Beauty's lengths.
        """
        for max_len in self.max_lens:
            cell = Cell("serving", max_len, "all_n", scaled(self.serving_batch, max_len), 2, True)
            yield cell, self.sampling_steps
            if max_len > self.max_lens[0]:
                continue
            yield cell._replace(blocks=1), self.sampling_steps
            yield cell._replace(batch=1), self.sampling_steps
            if few := tuple(steps for steps in self.sampling_steps if steps in self.few):
                laws = [law for law in self.laws if law != "all_n"]
                others = [cell._replace(softmax=False), *(cell._replace(lengths=law) for law in laws)]
                for other, blocks in product(others, (1, 2)):
                    yield other._replace(blocks=blocks), few

    def _serving(self, cell: Cell, sampling_steps: tuple[int, ...]) -> Iterator[Variant]:
        yield from _undenoised(cell)
        for form, place, steps in product(FORMS, ("all", "last") if cell.blocks > 1 else ("all",), sampling_steps):
            yield Variant(
                **cell._asdict(), attention="diffusion", form=form, sampler="ddim", steps=steps, sample_blocks=place
            )


def _undenoised(cell: Cell) -> Iterator[Variant]:
    yield Variant(**cell._asdict(), attention="dot_product")
    for form in FORMS:
        yield Variant(**cell._asdict(), attention="variational", form=form)


QUICK = Grid((1, 50, 200), (1, 4, 50), (50,), laws=("all_n",), training_batch=64, serving_batch=256, few=())


def scaled(batch: int, max_len: int) -> int:
    """Sequences of a batch at max_len that hold as many positions as `batch` do at max_len 50."""
    return max(1, batch * REFERENCE_LEN // max_len) if max_len > REFERENCE_LEN else batch


def select(variants: Sequence[Variant], filters: Sequence[str]) -> list[Variant]:
    """The variants that every `field=value[,value…]` lets through, and the dot product of each cell they are in.

    Where some variant of a cell has a wanted value, those without the field (V-GenAtt has no steps) stay beside it.
    Raises GenattError naming an unknown field, a value no variant has, or filters that leave nothing.
    """
    kept = list(variants)
    for text in filters:
        name, wanted = _filter(text, variants)
        named = {variant.cell for variant in kept if _text(getattr(variant, name)) in wanted}
        kept = [
            variant
            for variant in kept
            if variant.cell in named and _text(getattr(variant, name)) in {*wanted, _text(None)}
        ]
    if not kept:
        raise GenattError(f"--select {' --select '.join(filters)} leaves nothing to measure: drop one of them")
    there, chosen = {variant.cell for variant in kept}, set(kept)
    return [
        variant
        for variant in variants
        if variant in chosen or (variant.attention == "dot_product" and variant.cell in there)
    ]


def cells(variants: Sequence[Variant]) -> dict[Cell, list[Variant]]:
    """The variants by cell, in the order of the grid."""
    result: dict[Cell, list[Variant]] = {}
    for variant in variants:
        result.setdefault(variant.cell, []).append(variant)
    return result


def _filter(text: str, variants: Sequence[Variant]) -> tuple[str, set[str]]:
    """A filter's field and the values it lets through."""
    name, _, values = text.partition("=")
    known = [field.name for field in fields(Variant)]
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
        raise GenattError(f"--select {text}: unknown field {name!r}: {hint}")
    wanted = {value.strip().lower() for value in values.split(",")}
    there = {_text(getattr(variant, name)) for variant in variants} - {_text(None)}
    if missing := sorted(wanted - there):
        raise GenattError(
            f"--select {text}: no variant of the grid has {name}={','.join(missing)}: use {', '.join(sorted(there))}"
        )
    return name, wanted


def _text(value: object) -> str:
    """A field's value as a filter writes it; nothing a user types equals that of None."""
    return "" if value is None else str(value).lower()
