"""Ranks and the best k are those of a plain sort over the catalogue, however it is cut into shards and chunks."""

import numpy as np
import pytest
import torch

from genatt_dist.embedding.ranking import Query, Ranking, merge, rank_shard, target_scores

B, V, D, K = 9, 23, 3, 6


def case(seed: int, exclude_seen: bool = True) -> tuple[Query, torch.Tensor]:
    """Whole numbers, so that scores are exact and many are equal. User 0's target is among the seen; user 1 has seen
    all but three items; user 2 nothing.
    """
    draw = np.random.default_rng(seed)
    states = torch.from_numpy(draw.integers(-2, 3, (B, D))).float()
    rows = torch.from_numpy(draw.integers(-2, 3, (V, D))).float()
    targets = torch.from_numpy(draw.integers(1, V + 1, B))
    seen = [draw.choice(np.arange(1, V + 1), draw.integers(1, 8)).tolist() for _ in range(B)]  # with repeats
    seen[0].append(int(targets[0]))
    seen[1] = [item for item in range(1, V + 1) if item not in {int(targets[1]), 1, 2}]
    seen[2] = []
    pairs = [(user, item) for user, items in enumerate(seen) for item in items]
    pairs = pairs if exclude_seen else []
    row, item = (torch.tensor([pair[side] for pair in pairs], dtype=torch.int64) for side in (0, 1))
    return Query(states, row, item, targets), rows


def ranked(query: Query, rows: torch.Tensor, shards: int, chunk: int) -> Ranking:
    """What every rank of `shards` does, and how the parts are put together."""
    parts = rows.tensor_split(shards)
    firsts = [1 + sum(len(part) for part in parts[:index]) for index in range(shards)]
    pairs = list(zip(parts, firsts, strict=True))
    score = torch.stack([target_scores(query, part, first) for part, first in pairs]).amax(0)
    found = [rank_shard(query, part, first, score, K, chunk) for part, first in pairs]
    best, ids = merge(torch.cat([one.score_Bk for one in found], 1), torch.cat([one.top_Bk for one in found], 1), K)
    return Ranking(torch.stack([one.ahead_B for one in found]).sum(0), ids, best)


def sorted_catalogue(query: Query, rows: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """For each user the ids by (score falling, id), and their scores, from a full sort in NumPy."""
    scores = query.states_BD.numpy().astype(np.float64) @ rows.numpy().T.astype(np.float64)
    scores[query.seen_row_S.numpy(), query.seen_item_S.numpy() - 1] = -np.inf
    order = np.stack([np.lexsort((np.arange(V), -row)) for row in scores])
    return order + 1, np.take_along_axis(scores, order, 1)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("exclude_seen", [True, False])
@pytest.mark.parametrize("shards", [1, 2, 3, V + 2])  # the last: some shards are empty
@pytest.mark.parametrize("chunk", [1, 4, V, 3 * V])
def test_equals_a_plain_sort(seed: int, exclude_seen: bool, shards: int, chunk: int) -> None:
    query, rows = case(seed, exclude_seen)
    found = ranked(query, rows, shards, chunk)
    ids, scores = sorted_catalogue(query, rows)
    ahead = [int(np.flatnonzero(ids[user] == target)[0]) for user, target in enumerate(query.target_B.tolist())]
    assert found.ahead_B.tolist() == ahead
    assert np.array_equal(found.score_Bk.numpy(), scores[:, :K])
    for user in range(B):  # equal scores may stand in any order, but each id has its score and stands there once
        listed = [item for item in found.top_Bk[user].tolist() if item]
        position = {int(item): place for place, item in enumerate(ids[user])}
        assert [scores[user, position[item]] for item in listed] == scores[user, : len(listed)].tolist()
        assert len(listed) == len(set(listed)) == min(K, int(np.isfinite(scores[user]).sum()))


def test_a_target_that_was_seen_is_missed() -> None:
    query, rows = case(0)
    seen = set(query.seen_item_S[query.seen_row_S == 0].tolist())
    assert int(query.target_B[0]) in seen
    assert int(ranked(query, rows, 2, 4).ahead_B[0]) >= V - len(seen)


def test_what_was_seen_is_never_listed() -> None:
    """Also where fewer than k items are left: then the list ends in id 0."""
    query, rows = case(1)
    top = ranked(query, rows, 3, 5).top_Bk
    for user in range(B):
        assert not set(top[user].tolist()) & set(query.seen_item_S[query.seen_row_S == user].tolist())
    assert (top[1] > 0).sum() == 3
    assert top[1, 3:].tolist() == [0] * (K - 3)


def test_a_score_that_is_no_number_is_a_miss() -> None:
    """A model that diverged must not look perfect because nothing compares greater than NaN."""
    query, rows = case(0, exclude_seen=False)
    broken = Query(query.states_BD * torch.nan, query.seen_row_S, query.seen_item_S, query.target_B)
    assert ranked(broken, rows, 2, 4).ahead_B.tolist() == [V - 1] * B
