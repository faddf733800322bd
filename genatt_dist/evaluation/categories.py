"""Which categories each item has, from an attribute column of the vocabulary, and who may be shown what by them.

Legend: V items, K categories, E pairs of an item and one of its categories, G groups of users, C ids asked about.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import polars as pl
import pyarrow as pa
import torch
from torch import Tensor

from data_pipeline import format as shards
from data_pipeline.errors import GenattError
from data_pipeline.storage import redact
from genatt_dist.data.sequences import Sequences
from genatt_dist.embedding.ranking import Filter

_OWN = ("item_id", "dense_id", "count", "train_count")  # columns that are no attributes
_NAMED = 8  # categories an error names
_BLOCK = 1 << 24  # pairs of a group and an item's category looked at in one go


@dataclass(frozen=True)
class Categories:
    """Item i's categories are category_E[first[i] : first[i + 1]], each once; id 0 has none.

    names: of the K categories, in order. first: int64 [V + 2]. category_E: int32.
    """

    column: str
    names: list[str]
    first: Tensor
    category_E: Tensor

    def to(self, device: torch.device) -> Categories:
        return replace(self, first=self.first.to(device), category_E=self.category_E.to(device))

    def of(self, ids_C: Tensor) -> tuple[Tensor, Tensor]:
        """The pairs of these ids, id after id: (index into ids_C, category), both int64."""
        begin_C = self.first[ids_C]
        number_C = self.first[ids_C + 1] - begin_C
        index_P = torch.repeat_interleave(torch.arange(len(ids_C), device=ids_C.device), number_C)
        skipped_C = begin_C - (number_C.cumsum(0) - number_C)
        place_P = torch.arange(len(index_P), device=ids_C.device) + skipped_C[index_P]
        return index_P, self.category_E[place_P].long()

    def index(self, name: str) -> int:
        """The number of a category; GenattError with the nearest name where there is none."""
        if name in self.names:
            return self.names.index(name)
        near = difflib.get_close_matches(name, self.names, n=1)
        some = ", ".join(self.names[:_NAMED]) + (" …" if len(self.names) > _NAMED else "")
        raise GenattError(
            f"category {name!r} is not among the {len(self.names)} of column {self.column}: "
            + (f"did you mean {near[0]!r}?" if near else f"use {some}")
        )

    def filter(self, groups: Sequence[Sequence[str]], group_B: Tensor) -> Filter:
        """Lists of users of group g hold items with any of the categories groups[g]; of all items where it is empty."""
        device = self.first.device
        wanted_GK = torch.zeros(len(groups), len(self.names), dtype=torch.bool)
        for group, names in enumerate(groups):
            wanted_GK[group, [self.index(name) for name in names]] = True
        wanted_GK = wanted_GK.to(device)
        free_G1 = torch.tensor([[not names] for names in groups], device=device)

        def allowed(ids_C: Tensor) -> Tensor:
            index_P, category_P = self.of(ids_C)
            rows = max(1, _BLOCK // max(1, len(index_P)))
            parts = []
            for wanted_HK in wanted_GK.split(rows):
                hits_HC = torch.zeros(len(wanted_HK), len(ids_C), dtype=torch.int32, device=device)
                parts.append(hits_HC.index_add_(1, index_P, wanted_HK[:, category_P].int()) > 0)
            return torch.cat(parts) | free_G1

        return Filter(group_B.to(device), allowed)


def categories_of(sequences: Sequences, column: str | None, device: torch.device) -> Categories | None:
    """The categories in `column` of the vocabulary; without a name, in the one that looks like it, or None.

    That is the only column of lists of text; where there is none, the only column of text whose values repeat (at most
    half as many as items). Read once for a data set. Raises GenattError: no such column, or one of numbers with a
    fraction.
    """
    if not sequences.path:  # made in memory
        return None
    return _read(sequences.path, sequences.manifest_hash, column, device)


def need_categories(sequences: Sequences, column: str | None, device: torch.device) -> Categories:
    """`categories_of`, or GenattError where there are none."""
    found = categories_of(sequences, column, device)
    if found is None:
        raise GenattError(
            f"{redact(sequences.path)} has no column that is plainly categories in its vocabulary: name one by "
            "evaluation.category_column in the run's config.yaml, or prepare the data with items' attributes (--items)"
        )
    return found


@lru_cache(maxsize=2)
def _read(path: str, manifest_hash: str, column: str | None, device: torch.device) -> Categories | None:
    """manifest_hash: only tells contents of one path apart."""
    vocabulary = shards.read_vocabulary(path, shards.load_manifest(path))
    attributes = [name for name in vocabulary.column_names if name not in _OWN]
    if column is None and (column := _chosen(vocabulary, attributes)) is None:
        return None
    if column not in attributes:
        known = f"it has {', '.join(attributes)}" if attributes else "it has no attributes"
        raise GenattError(f"evaluation.category_column={column} is not in the vocabulary of {redact(path)}: {known}")
    kind = vocabulary.schema.field(column).type
    kind = kind.value_type if _is_list(kind) else kind
    if not (_is_text(kind) or pa.types.is_integer(kind)):
        raise GenattError(f"evaluation.category_column={column} of {redact(path)} holds {kind}: use one of text")
    frame = pl.DataFrame(vocabulary.select(["dense_id", column])).rename({column: "category"})
    if isinstance(frame.schema["category"], pl.List):
        frame = frame.explode("category")
    frame = frame.cast({"category": pl.String}).filter(pl.col("category").is_not_null() & (pl.col("category") != ""))
    frame = frame.unique().sort("dense_id", "category")
    if not frame.height:
        return None
    number = torch.bincount(frame["dense_id"].cast(pl.Int64).to_torch(), minlength=vocabulary.num_rows + 1)
    return Categories(
        column,
        frame["category"].unique().sort().to_list(),
        torch.cat((torch.zeros(1, dtype=torch.int64), number.cumsum(0))),
        frame["category"].rank("dense").cast(pl.Int32).to_torch() - 1,
    ).to(device)


def _chosen(vocabulary: pa.Table, attributes: list[str]) -> str | None:
    kinds = {name: vocabulary.schema.field(name).type for name in attributes}
    lists = [name for name, kind in kinds.items() if _is_list(kind) and _is_text(kind.value_type)]
    if lists:
        return lists[0] if len(lists) == 1 else None
    texts = [
        name
        for name, kind in kinds.items()
        if _is_text(kind) and 2 * len(vocabulary[name].unique()) <= vocabulary.num_rows
    ]
    return texts[0] if len(texts) == 1 else None


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind)


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_dictionary(kind)
