"""Where the true next item stands among all items: exact ranks and the best k, in chunks, for a whole table or a shard
of it.

Order: score descending, then id ascending. Items a user has seen score −∞ (also when the target is one of them: then
it is missed).
Legend: B users, V rows of the shard, D width, S seen pairs, k items kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Query:
    """What is to be ranked: states_BD, the pairs (row, item) to leave out, and the target ids if there are any."""

    states_BD: Tensor
    seen_row_S: Tensor
    seen_item_S: Tensor
    target_B: Tensor


@dataclass(frozen=True)
class Ranking:
    """ahead_B: items not ordered after the target (int64), so a score that is no number counts as a miss.

    top_Bk, score_Bk: ids and scores of the best k, best first; items of equal score stand there in any order, and where
    fewer than k are left the id is 0 and the score −∞.
    """

    ahead_B: Tensor
    top_Bk: Tensor
    score_Bk: Tensor


def target_scores(query: Query, rows_VD: Tensor, first_id: int) -> Tensor:
    """Scores of the targets whose rows lie here (ids first_id ..), −∞ where they are seen or elsewhere: float32 [B]."""
    if not len(rows_VD):  # a rank of a table with fewer rows than ranks
        return torch.full((len(query.states_BD),), float("-inf"), device=query.states_BD.device)
    local_B = query.target_B - first_id
    here_B = (local_B >= 0) & (local_B < len(rows_VD))
    rows_BD = rows_VD[local_B.clamp(0, len(rows_VD) - 1)].to(query.states_BD.dtype)
    score_B = (query.states_BD * rows_BD).sum(-1).float()
    score_B = score_B.masked_fill(~here_B, float("-inf"))
    hit_S = query.seen_item_S == query.target_B[query.seen_row_S]
    return score_B.index_fill(0, query.seen_row_S[hit_S], float("-inf"))


def rank_shard(query: Query, rows_VD: Tensor, first_id: int, target_score_B: Tensor, k: int, chunk: int) -> Ranking:
    """Rank the items first_id .. first_id + V − 1 for every user; ahead_B counts the items of this shard only."""
    by_item = torch.argsort(query.seen_item_S)
    seen_item_S, seen_row_S = query.seen_item_S[by_item], query.seen_row_S[by_item]
    size = len(query.states_BD)
    device = query.states_BD.device
    ahead_B = torch.zeros(size, dtype=torch.int64, device=device)
    score_Bk = torch.full((size, k), float("-inf"), device=device)
    top_Bk = torch.zeros((size, k), dtype=torch.int64, device=device)
    for low in range(0, len(rows_VD), chunk):
        part_CD = rows_VD[low : low + chunk].to(query.states_BD.dtype)  # bf16 under bf16
        ids_C = torch.arange(first_id + low, first_id + low + len(part_CD), device=device)
        logits_BC = (query.states_BD @ part_CD.T).float()  # float32 holds places up to 2^24 exactly
        begin, end = torch.searchsorted(seen_item_S, torch.stack((ids_C[0], ids_C[-1] + 1))).tolist()
        logits_BC[seen_row_S[begin:end], seen_item_S[begin:end] - ids_C[0]] = float("-inf")
        target_B1, score_B1 = query.target_B[:, None], target_score_B[:, None]
        behind_BC = (logits_BC < score_B1) | ((logits_BC == score_B1) & (ids_C > target_B1))
        ahead_B += (~behind_BC & (ids_C != target_B1)).sum(1)
        best_Bk, index_Bk = logits_BC.topk(min(k, logits_BC.shape[1]), dim=1)
        score_Bk, top_Bk = merge(torch.cat((score_Bk, best_Bk), 1), torch.cat((top_Bk, ids_C[index_Bk]), 1), k)
    return Ranking(ahead_B, top_Bk, score_Bk)


def merge(score_BM: Tensor, id_BM: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The best k of M scored ids, best first; id 0 where the score is −∞."""
    score_Bk, index_Bk = score_BM.topk(k, dim=1)
    return score_Bk, id_BM.gather(1, index_Bk).masked_fill(score_Bk == float("-inf"), 0)
