"""Full ranking of one split: every user's target against every item, on one process or many.

Legend: B users of a batch, U users of the split, V items, C cutoffs, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from genatt_dist.attention.noise import NoiseKey, Purpose, derive
from genatt_dist.config import RunConfig
from genatt_dist.data.batches import Histories, evaluation_batches
from genatt_dist.data.sequences import Sequences
from genatt_dist.embedding.ranking import Query
from genatt_dist.embedding.table import ItemTable
from genatt_dist.evaluation.metrics import CUTOFFS, metrics
from genatt_dist.model.backbone import Backbone
from genatt_dist.model.context import Context
from genatt_dist.model.diagnostics import statistics


@dataclass(frozen=True)
class Parts:
    """How a split is divided over processes: this one's number, how many, and how tensors are summed over all."""

    rank: int = 0
    world_size: int = 1
    total: Callable[[Tensor], Tensor] = torch.Tensor.clone


@dataclass(frozen=True)
class Result:
    """metrics by name; rank_U: rank of each target from 1 (users with a target, in shard order)."""

    metrics: dict[str, float]
    rank_U: npt.NDArray[np.int64]


@torch.no_grad()
def encode(
    backbone: Backbone, rows_ND: Tensor, histories: Histories, config: RunConfig, total: Callable[[Tensor], Tensor]
) -> Tensor:
    """The state that predicts each user's next item: [B, D] in float32."""
    context = _context(histories, config, total)
    return backbone.last_states(rows_ND.to(next(backbone.parameters()).dtype), context).float()


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
    diagnose: bool = False,
) -> Result:
    """Rank the targets of `split`. The backbone must be in evaluation mode; a sharded table needs every rank here at
    once.

    diagnose: add statistics of the attention maps of the first batch (`attention_entropy/block0` and so on).
    """
    rank_U = torch.zeros(sequences.num_users, dtype=torch.int64, device=device)
    shown_CV = torch.zeros((len(CUTOFFS), sequences.num_items + 1), dtype=torch.int64, device=device)
    observed: dict[str, tuple[Tensor, Tensor]] = {}
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
        rows_ND = table.lookup(histories.items_N)
        if diagnose and not observed:
            context = _context(histories, config, parts.total)
            context = replace(context, num_tokens=parts.total(context.num_tokens))
            observed = statistics(backbone, rows_ND.to(next(backbone.parameters()).dtype), context)
        states_BD = encode(backbone, rows_ND, histories, config, parts.total)
        ranking = table.rank(
            query(states_BD, histories, config.evaluation.exclude_seen), max(CUTOFFS), config.evaluation.chunk_items
        )
        rank_U[histories.user_B] = ranking.ahead_B + 1
        for cutoff, k in enumerate(CUTOFFS):
            top = ranking.top_Bk[:, :k].flatten()
            shown_CV[cutoff].index_add_(0, top, torch.ones_like(top))
        progress(len(states_BD))
    ranks = parts.total(rank_U).cpu().numpy()[sequences.has_targets]
    values = metrics(ranks, parts.total(shown_CV)[:, 1:].cpu().numpy())
    for name, (amount, count) in observed.items():
        values[name] = float((parts.total(amount) / parts.total(count)).mean())
    return Result(values, ranks)


def query(states_BD: Tensor, histories: Histories, exclude_seen: bool) -> Query:
    """What the table is asked for these users. Without targets (recommendation) id 0 stands in: its rank is not
    read.
    """
    kept = slice(None) if exclude_seen else slice(0)
    targets = histories.target_B if histories.target_B is not None else torch.zeros_like(histories.user_B)
    return Query(states_BD, histories.seen_row_S[kept], histories.seen_item_S[kept], targets)


def _context(histories: Histories, config: RunConfig, total: Callable[[Tensor], Tensor]) -> Context:
    layout, root = histories.layout, int(derive(config.training.seed, int(Purpose.REQUEST)))
    return Context(
        layout=layout,
        noise=NoiseKey.make(root, 0, histories.user_B, layout.row_N, layout.position_N),
        num_tokens=torch.tensor(float(len(layout.row_N)), device=histories.items_N.device),
        total=total,
    )
