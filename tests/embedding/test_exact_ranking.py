"""Ranks and the best k are those of a plain sort over the catalogue, however it is cut into shards and chunks."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from genatt_dist.embedding.ranking import Filter, Query, Ranking, merge, rank_shard, target_scores

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


def ranked(query: Query, rows: torch.Tensor, shards: int, chunk: int, k: int = K) -> Ranking:
    """What every rank of `shards` does, and how the parts are put together."""
    parts = rows.tensor_split(shards)
    firsts = [1 + sum(len(part) for part in parts[:index]) for index in range(shards)]
    pairs = list(zip(parts, firsts, strict=True))
    score = torch.stack([target_scores(query, part, first) for part, first in pairs]).amax(0)
    found = [rank_shard(query, part, first, score, k, chunk) for part, first in pairs]
    best, ids = merge(torch.cat([one.score_Bk for one in found], 1), torch.cat([one.top_Bk for one in found], 1), k)
    return Ranking(torch.stack([one.ahead_B for one in found]).sum(0), ids, best)


def sorted_catalogue(query: Query, rows: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """For each user the ids by (score falling, id), and their scores, from a full sort in NumPy."""
    scores = query.states_BD.numpy().astype(np.float64) @ rows.numpy().T.astype(np.float64)
    scores[query.seen_row_S.numpy(), query.seen_item_S.numpy() - 1] = -np.inf
    if query.only is not None:
        scores[~query.only.allowed(torch.arange(1, V + 1))[query.only.group_B].numpy()] = -np.inf
    order = np.stack([np.lexsort((np.arange(V), -row)) for row in scores])
    return order + 1, np.take_along_axis(scores, order, 1)


def assert_sorted(found: Ranking, query: Query, rows: torch.Tensor, k: int = K) -> None:
    """Ranks, lists and scores are those of the full sort; a list ends in id 0 where nothing is left."""
    ids, scores = sorted_catalogue(query, rows)
    ahead = [int(np.flatnonzero(ids[user] == target)[0]) for user, target in enumerate(query.target_B.tolist())]
    assert found.ahead_B.tolist() == ahead
    more = max(0, k - V)
    scores = np.pad(scores, ((0, 0), (0, more)), constant_values=-np.inf)[:, :k]
    ids = np.where(scores == -np.inf, 0, np.pad(ids, ((0, 0), (0, more)))[:, :k])
    assert np.array_equal(found.score_Bk.numpy(), scores)
    assert np.array_equal(found.top_Bk.numpy(), ids)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("exclude_seen", [True, False])
@pytest.mark.parametrize("shards", [1, 2, 3, V + 2])  # the last: some shards are empty
@pytest.mark.parametrize("chunk", [1, 4, V, 3 * V])
def test_equals_a_plain_sort(seed: int, exclude_seen: bool, shards: int, chunk: int) -> None:
    query, rows = case(seed, exclude_seen)
    assert_sorted(ranked(query, rows, shards, chunk), query, rows)


@pytest.mark.parametrize("k", [1, V, V + 7])
@pytest.mark.parametrize("chunk", [1, 4, 3 * V])
def test_lists_of_any_length(k: int, chunk: int) -> None:
    query, rows = case(2)
    assert_sorted(ranked(query, rows, 3, chunk, k), query, rows, k)


@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_among_equal_scores_the_smaller_id_comes_first(zero: float) -> None:
    """Where all scores are equal nothing else decides, zeros of either sign among them."""
    query, rows = case(0)
    rows = torch.where(torch.arange(V)[:, None] % 2 == 0, zero, 0.0).expand(V, D)
    for chunk in (3, 2 * V):
        assert_sorted(ranked(query, rows, 2, chunk), query, rows)


@pytest.mark.parametrize("shards", [1, 3, V + 2])
@pytest.mark.parametrize("chunk", [1, 5, V])
def test_a_filter_leaves_only_what_a_group_may_have(shards: int, chunk: int) -> None:
    """Group 0 may have every third item, group 1 all of them, group 2 none, group 3 a single one."""
    query, rows = case(3)

    def allowed(ids: torch.Tensor) -> torch.Tensor:
        return torch.stack((ids % 3 == 0, ids > 0, ids < 0, ids == 7))

    query = replace(query, only=Filter(torch.arange(B) % 4, allowed))
    found = ranked(query, rows, shards, chunk)
    assert_sorted(found, query, rows)
    assert found.top_Bk[2].tolist() == [0] * K


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rows_of_half_precision_are_scored_in_that_of_the_states(dtype: torch.dtype) -> None:
    query, rows = case(4)  # small whole numbers: exact in all of them
    found = ranked(query, rows.to(dtype), 2, 7)
    assert found.score_Bk.dtype == torch.float32
    assert_sorted(found, query, rows)


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
