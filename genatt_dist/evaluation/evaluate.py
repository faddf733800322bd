"""Full ranking of one split: every user's target against every item, on one process or many.

Legend: B users of a batch, U users of the split, V items, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from data_pipeline.errors import GenattError
from genatt_dist.attention.noise import NoiseKey, Purpose, derive
from genatt_dist.config import RunConfig
from genatt_dist.data.histories import Histories, evaluation_batches
from genatt_dist.data.sequences import Sequences
from genatt_dist.embedding.features import input_rows
from genatt_dist.embedding.ranking import Query
from genatt_dist.embedding.table import ItemTable
from genatt_dist.evaluation.categories import categories_of, need_categories
from genatt_dist.evaluation.diversity import Lists
from genatt_dist.evaluation.metrics import CUTOFFS, metrics
from genatt_dist.model.backbone import Backbone
from genatt_dist.model.context import Context


@dataclass(frozen=True)
class Parts:
    """How a split is divided over processes: this one's number, how many, and how tensors are summed over all."""

    rank: int = 0
    world_size: int = 1
    total: Callable[[Tensor], Tensor] = torch.Tensor.clone


@dataclass(frozen=True)
class Result:
    """metrics by name; rank_U: rank of each target from 1; user_U: whose, as indices in the data set, rising."""

    metrics: dict[str, float]
    rank_U: npt.NDArray[np.int64]
    user_U: npt.NDArray[np.int64]


@torch.no_grad()
def encode(backbone: Backbone, rows_ND: Tensor, histories: Histories, config: RunConfig) -> Tensor:
    """The state that predicts each user's next item: [B, D] in float32."""
    rows_ND = rows_ND.to(next(backbone.parameters()).dtype)
    return backbone.last_states(rows_ND, sampling_context(histories, config)).float()


@torch.no_grad()
def evaluate(
    backbone: Backbone,
    table: ItemTable,
    sequences: Sequences,
    split: str,
    config: RunConfig,
    device: torch.device,
    parts: Parts = Parts(),
    progress: Callable[[int], None] = lambda users: None,
    only: Sequence[str] = (),
) -> Result:
    """Rank the targets of `split`. The backbone must be in evaluation mode; a sharded table needs every rank here at
    once.

    only: categories; then items of any of them alone are ranked, for the users whose target is such an item. Shares of
    the catalogue stay shares of the whole.
    """
    rank_U = torch.zeros(sequences.num_users, dtype=torch.int64, device=device)
    find = need_categories if only else categories_of
    categories = find(sequences, config.evaluation.category_column, device)
    lists = Lists(sequences.popularity, categories, device)
    batches = evaluation_batches(
        sequences,
        split,
        config.data.max_len,
        config.evaluation.batch_users * parts.world_size,
        parts.rank,
        parts.world_size,
        device,
    )
    for histories in batches:
        rows_ND = input_rows(table, histories)
        states_BD = encode(backbone, rows_ND, histories, config)
        asked = query(states_BD, histories, config.evaluation.exclude_seen, sequences.manifest.out_of_vocabulary)
        if only:
            assert categories is not None
            asked = replace(asked, only=categories.filter([only], torch.zeros_like(histories.user_B)))
        ranking = table.rank(asked, max(CUTOFFS), config.evaluation.chunk_items)
        user_B, ahead_B, top_Bk = histories.user_B, ranking.ahead_B, ranking.top_Bk
        if asked.only is not None:
            counted_B = asked.only.allowed(asked.target_B)[0]
            user_B, ahead_B, top_Bk = user_B[counted_B], ahead_B[counted_B], top_Bk[counted_B]
        rank_U[user_B] = ahead_B + 1
        lists.add(top_Bk)
        progress(len(states_BD))
    return result(parts.total(rank_U).cpu().numpy(), lists, parts.total, f"{split} item of {', '.join(only)}")


def result(
    rank_U: npt.NDArray[np.int64], lists: Lists, total: Callable[[Tensor], Tensor] = torch.Tensor.clone, what: str = ""
) -> Result:
    """All metrics of ranks [all users of the data set], 0 = not ranked, and of lists. Collective.

    Raises GenattError, saying `what` nobody has, when no user was ranked.
    """
    (user_U,) = np.nonzero(rank_U)
    if not len(user_U):
        raise GenattError(f"no user has a {what} to be ranked: choose other categories")
    shown_XV = lists.shown(total)
    accuracy = metrics(rank_U[user_U], shown_XV)
    return Result(accuracy | lists.metrics(accuracy, shown_XV, total), rank_U[user_U], user_U)


def query(states_BD: Tensor, histories: Histories, exclude_seen: bool, never: int | None = None) -> Query:
    """What the table is asked for these users. Without targets (recommendation) id 0 stands in: its rank is not
    read. never: an id that no list may hold, that which rare items share.
    """
    kept = slice(None) if exclude_seen else slice(0)
    row_S, item_S = histories.seen_row_S[kept], histories.seen_item_S[kept]
    if never is not None:
        row_B = torch.arange(len(states_BD), device=row_S.device)
        row_S, item_S = torch.cat((row_S, row_B)), torch.cat((item_S, torch.full_like(row_B, never)))
    targets = histories.target_B if histories.target_B is not None else torch.zeros_like(histories.user_B)
    return Query(states_BD, row_S, item_S, targets)


def sampling_context(
    histories: Histories, config: RunConfig, total: Callable[[Tensor], Tensor] = torch.Tensor.clone
) -> Context:
    """The context of a forward pass that samples for these users; their noise hangs on the run's seed and the user."""
    layout, root = histories.layout, int(derive(config.training.seed, int(Purpose.REQUEST)))
    num_tokens = torch.full((), len(layout.row_N), dtype=torch.float32, device=histories.items_N.device)
    return Context(
        layout,
        NoiseKey.make(root, 0, histories.user_B, layout.row_N, layout.position_N),
        num_tokens=total(num_tokens),
        total=total,
    )
