"""Where the true next item stands among all items: exact ranks and the best k, in chunks, for a whole table or a shard
of it.

Order: score descending, then id ascending. Items a user has seen, or that a filter leaves out, score −∞ (also when the
target is one of them: then it is missed). No tensor has users × items: the largest has users × chunk.
Legend: B users, V rows of the shard, D width, S seen pairs, G groups of a filter, C items of a chunk, k items kept, M
items to choose them from.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Filter:
    """Which items may stand in whose list: those allowed to the group a user is of.

    group_B: int64. allowed: ids [C] → bool [G, C]; with a sharded table every rank gives the same groups.
    """

    group_B: Tensor
    allowed: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Query:
    """What is to be ranked: states_BD, the pairs (row, item) to leave out, the target ids if there are any, and the
    filter if there is one (on every rank or on none).
    """

    states_BD: Tensor
    seen_row_S: Tensor
    seen_item_S: Tensor
    target_B: Tensor
    only: Filter | None = None


@dataclass(frozen=True)
class Ranking:
    """ahead_B: items not ordered after the target (int64), so a score that is no number counts as a miss.

    top_Bk, score_Bk: ids and scores of the best k in order; where fewer than k are left the id is 0 and the score −∞.
    """

    ahead_B: Tensor
    top_Bk: Tensor
    score_Bk: Tensor


def target_scores(query: Query, rows_VD: Tensor, first_id: int) -> Tensor:
    """Scores of the targets whose rows lie here (ids first_id ..), −∞ where they are left out or elsewhere: float32
    [B].
    """
    if not len(rows_VD):  # a rank of a table with fewer rows than ranks
        return torch.full((len(query.states_BD),), float("-inf"), device=query.states_BD.device)
    local_B = query.target_B - first_id
    out_B = (local_B < 0) | (local_B >= len(rows_VD))
    rows_BD = rows_VD[local_B.clamp(0, len(rows_VD) - 1)].to(query.states_BD.dtype)
    score_B = (query.states_BD * rows_BD).sum(-1).float()
    if query.only is not None:
        out_B = out_B | ~query.only.allowed(query.target_B).gather(0, query.only.group_B[None])[0]
    score_B = score_B.masked_fill(out_B, float("-inf"))
    hit_S = query.seen_item_S == query.target_B[query.seen_row_S]
    return score_B.index_fill(0, query.seen_row_S[hit_S], float("-inf"))


def rank_shard(query: Query, rows_VD: Tensor, first_id: int, target_score_B: Tensor, k: int, chunk: int) -> Ranking:
    """Rank the items first_id .. first_id + V − 1 for every user; ahead_B counts the items of this shard only.

    Rows of any floating type are scored in that of the states, a chunk converted at a time.
    """
    by_item = torch.argsort(query.seen_item_S)
    seen_item_S, seen_row_S = query.seen_item_S[by_item], query.seen_row_S[by_item]
    size = len(query.states_BD)
    device = query.states_BD.device
    ahead_B = torch.zeros(size, dtype=torch.int64, device=device)
    score_Bk = torch.full((size, k), float("-inf"), device=device)
    top_Bk = torch.zeros((size, k), dtype=torch.int64, device=device)
    target_B1, score_B1 = query.target_B[:, None], target_score_B[:, None]
    for low in range(0, len(rows_VD), chunk):
        part_CD = rows_VD[low : low + chunk].to(query.states_BD.dtype)  # bf16 under bf16
        ids_C = torch.arange(first_id + low, first_id + low + len(part_CD), device=device)
        logits_BC = (query.states_BD @ part_CD.T).float()  # float32 holds places up to 2^24 exactly
        begin, end = torch.searchsorted(seen_item_S, torch.stack((ids_C[0], ids_C[-1] + 1))).tolist()
        logits_BC[seen_row_S[begin:end], seen_item_S[begin:end] - ids_C[0]] = float("-inf")
        if query.only is not None:
            logits_BC.masked_fill_(~query.only.allowed(ids_C)[query.only.group_B], float("-inf"))
        ahead_B += len(ids_C) - _not_ahead(logits_BC, ids_C, target_B1, score_B1)
        best_Bk, index_Bk = _best(logits_BC, k)
        score_Bk, top_Bk = merge(torch.cat((score_Bk, best_Bk), 1), torch.cat((top_Bk, ids_C[index_Bk]), 1), k)
    return Ranking(ahead_B, top_Bk, score_Bk)


def merge(score_BM: Tensor, id_BM: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The first k of M scored ids by (score falling, id rising); id 0 where the score is −∞."""
    id_BM, by_id_BM = id_BM.sort(dim=1)
    score_BM, by_score_BM = score_BM.gather(1, by_id_BM).sort(dim=1, descending=True, stable=True)
    score_Bk = score_BM[:, :k]
    return score_Bk, id_BM.gather(1, by_score_BM[:, :k]).masked_fill(score_Bk == float("-inf"), 0)


def _not_ahead(logits_BC: Tensor, ids_C: Tensor, target_B1: Tensor, score_B1: Tensor) -> Tensor:
    """How many of the items are the target or ordered after it: int32 [B]."""
    behind_BC = logits_BC == score_B1
    behind_BC &= ids_C.int() > target_B1.int()
    behind_BC |= logits_BC < score_B1
    place_B1 = target_B1 - ids_C[0]
    here_B1 = (place_B1 >= 0) & (place_B1 < len(ids_C))
    place_B1 = place_B1.clamp(0, len(ids_C) - 1)
    behind_BC.scatter_(1, place_B1, behind_BC.gather(1, place_B1) | here_B1)
    return behind_BC.view(torch.uint8).sum(1, dtype=torch.int32)  # four times as fast as a sum of booleans


def _best(logits_BC: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Scores and columns of the best min(k, C) in any order; of equal scores at the edge the first columns.

    topk chooses freely among equal scores. Whether it had a choice shows in one score more than asked for; the few
    users for whom it had are chosen for again.
    """
    best_Bk, index_Bk = logits_BC.topk(min(k + 1, logits_BC.shape[1]), dim=1)
    if best_Bk.shape[1] <= k:
        return best_Bk, index_Bk
    edge_B = best_Bk[:, k - 1]
    tied_B = (edge_B == best_Bk[:, k]) & (edge_B > float("-inf"))
    best_Bk, index_Bk = best_Bk[:, :k], index_Bk[:, :k]
    if tied_B.any():
        logits_TC, edge_T1 = logits_BC[tied_B], edge_B[tied_B, None]
        width = logits_TC.shape[1]
        turn_C = torch.arange(width, 0, -1, dtype=torch.int32, device=logits_BC.device)
        choice_TC = torch.where(logits_TC == edge_T1, turn_C, 0).masked_fill_(logits_TC > edge_T1, width + 1)
        index_Tk = choice_TC.topk(k, dim=1).indices
        index_Bk = index_Bk.index_put((tied_B,), index_Tk)
        best_Bk = best_Bk.index_put((tied_B,), logits_TC.gather(1, index_Tk))
    return best_Bk, index_Bk
