"""Ranking over the shards of a table: every rank scores all users of the global batch against its own rows.

Users travel once (states, seen pairs, targets), results go back to the rank that asked. A rank holds the global batch's
states and its best k, and for one asking rank's users at a time the block of scores: users of a rank × chunk. Nothing
grows with users × items, nor with ranks × ranks.

Legend: B users of this rank, A users of all ranks, W ranks, V rows on this rank, D width, S seen pairs, k items kept.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from genatt_dist.embedding.exchange import Ranks
from genatt_dist.embedding.ranking import Filter, Query, Ranking, merge, rank_shard, target_scores


def rank_over_ranks(query: Query, rows_VD: Tensor, first_id: int, k: int, chunk: int) -> Ranking:
    """Rank the items of all ranks for this rank's users, given the rows of the ids first_id … first_id + V − 1 that lie
    here. Collective: every rank must be here, with rows and users or without.
    """
    ranks = Ranks.of(len(query.target_B), query.target_B.device)
    asked = _gathered(query, ranks)
    target_score_A = torch.cat([target_scores(part, rows_VD, first_id) for part in asked])
    dist.all_reduce(target_score_A, dist.ReduceOp.MAX)
    found = [
        rank_shard(part, rows_VD, first_id, score_B, k, chunk)
        for part, score_B in zip(asked, target_score_A.split(ranks.sizes), strict=True)
    ]
    ahead_WB = _returned(torch.cat([one.ahead_B for one in found]), ranks)
    score_WBk = _returned(torch.cat([one.score_Bk for one in found]), ranks)
    top_WBk = _returned(torch.cat([one.top_Bk for one in found]), ranks)
    score_Bk, top_Bk = merge(score_WBk.transpose(0, 1).flatten(1), top_WBk.transpose(0, 1).flatten(1), k)
    return Ranking(ahead_WB.sum(0), top_Bk, score_Bk)


def _gathered(query: Query, ranks: Ranks) -> list[Query]:
    """What every rank asks, by rank."""
    pairs = Ranks.of(len(query.seen_row_S), query.seen_row_S.device)

    def by_rank(x_N: Tensor, of: Ranks) -> tuple[Tensor, ...]:
        return of.gather(x_N).split(of.sizes)

    states, targets = by_rank(query.states_BD, ranks), by_rank(query.target_B, ranks)
    rows, items = by_rank(query.seen_row_S, pairs), by_rank(query.seen_item_S, pairs)
    filters: list[Filter | None] = [None] * len(states)
    if query.only is not None:
        filters = [Filter(group_B, query.only.allowed) for group_B in by_rank(query.only.group_B, ranks)]
    return [Query(*parts) for parts in zip(states, rows, items, targets, filters, strict=True)]


def _returned(x_A: Tensor, ranks: Ranks) -> Tensor:
    """Rows for the users of all ranks, one rank's after the other → [W, B, …]: what each rank found for this one's."""
    mine, world_size = ranks.sizes[ranks.rank], len(ranks.sizes)
    received = x_A.new_empty((world_size * mine, *x_A.shape[1:]))
    dist.all_to_all_single(received, x_A.contiguous(), [mine] * world_size, ranks.sizes)
    return received.view(world_size, mine, *x_A.shape[1:])
