"""Ranks, lists and all metrics are the same on one, two and three ranks, whatever lies where, filters too."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import ranks
import torch
import torch.distributed as dist
from category_data import GENRES, add_genres
from joint_runs import CPU, sharded_table

from genatt_dist.config import RunConfig
from genatt_dist.data.sequences import Sequences
from genatt_dist.embedding.rank_exchange import rank_over_ranks
from genatt_dist.embedding.ranking import Filter, Query, Ranking
from genatt_dist.embedding.table import rank_rows
from genatt_dist.evaluation.evaluate import Parts, Result, evaluate
from genatt_dist.training.engine import sum_over_ranks
from genatt_dist.training.step import DenseModel

pytestmark = pytest.mark.distributed

_B, _V, _D, _K, _CHUNK = 11, 40, 3, 12, 7


def _case(filtered: bool) -> tuple[Query, torch.Tensor]:
    """Whole numbers: exact scores, many of them equal. With a filter, one of three groups may have nothing."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randint(-2, 3, (_B, _D), generator=generator).float()
    rows = torch.randint(-2, 3, (_V, _D), generator=generator).float()
    seen = torch.randint(1, _V + 1, (2 * _B,), generator=generator)
    only = Filter(torch.arange(_B) % 3, _thirds) if filtered else None
    return Query(
        states, torch.arange(_B).repeat(2), seen, torch.randint(1, _V + 1, (_B,), generator=generator), only
    ), rows


def _thirds(ids: torch.Tensor) -> torch.Tensor:
    return torch.stack((ids % 3 == 1, ids > 0, ids < 0))


def _asked(query: Query, low: int, high: int) -> Query:
    mine = (query.seen_row_S >= low) & (query.seen_row_S < high)
    only = None if query.only is None else Filter(query.only.group_B[low:high], query.only.allowed)
    seen = (query.seen_row_S[mine] - low, query.seen_item_S[mine])
    return Query(query.states_BD[low:high], *seen, query.target_B[low:high], only)


def _ranked(filtered: bool, users: list[int], rows: list[int]) -> list[np.ndarray]:
    """Rank r asks for users users[r] … users[r + 1] − 1 and holds rows rows[r] … rows[r + 1] − 1."""
    query, table = _case(filtered)
    rank = dist.get_rank()
    mine, held = _asked(query, users[rank], users[rank + 1]), table[rows[rank] : rows[rank + 1]]
    return _arrays(rank_over_ranks(mine, held, 1 + rows[rank], _K, _CHUNK))


def _arrays(found: Ranking) -> list[np.ndarray]:
    return [found.ahead_B.numpy(), found.top_Bk.numpy(), found.score_Bk.numpy()]


@pytest.mark.parametrize("filtered", [False, True])
@pytest.mark.parametrize(
    ("users", "rows"),
    [
        ([0, _B], [0, _V]),
        ([0, 8, _B], [0, 21, _V]),
        ([0, 1, _B], [0, _V, _V]),  # no rows on rank 1
        ([0, 5, 5, _B], [0, 0, 39, _V]),  # no users on rank 1, no rows on rank 0
    ],
)
def test_lists_and_ranks_are_those_of_one_process(filtered: bool, users: list[int], rows: list[int]) -> None:
    query, table = _case(filtered)
    expected = _arrays(rank_rows(table, query, _K, _CHUNK))
    found = ranks.run_in_group(_ranked, len(users) - 1, filtered, users, rows)
    for parts, whole in zip(zip(*found, strict=True), expected, strict=True):
        np.testing.assert_array_equal(np.concatenate(parts), whole)


@pytest.fixture(scope="module")
def labelled(write_set: Callable[[Path, int], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The set of these tests with genres in its vocabulary."""
    path = write_set(tmp_path_factory.mktemp("labelled") / "shards", 0)
    add_genres(path, 200)
    return path


def _evaluated(config: RunConfig, only: tuple[str, ...]) -> Result:
    sequences = Sequences.read(config.data.path)
    torch.manual_seed(0)
    dense = DenseModel(config, sequences.num_items).eval()
    table = sharded_table(config, sequences.num_items) if config.table.kind == "sharded" else dense.items
    assert table is not None
    parts = Parts(dist.get_rank(), dist.get_world_size(), sum_over_ranks)
    return evaluate(dense.backbone, table, sequences, "test", config, CPU, parts, only=only)


@pytest.mark.parametrize("only", [(), ("Drama", GENRES[2])])
def test_metrics_are_those_of_one_rank(
    make_config: Callable[..., RunConfig], labelled: Path, only: tuple[str, ...]
) -> None:
    """Whole numbers are what ranks add, so metrics are equal to the last digit where ranks and lists are."""

    def run(world_size: int, kind: str) -> Result:
        config = make_config(f"data.path={labelled}", f"table.kind={kind}", f"world_size={world_size}")
        first, *others = ranks.run_in_group(_evaluated, world_size, config, only)
        assert all(other.metrics == first.metrics for other in others)
        return first

    expected = run(1, "replicated")
    assert {"cc@10", "f@10", "ild@10", "gini@10", "novelty@10", "mrr"} <= expected.metrics.keys()
    for world_size, kind in ((2, "replicated"), (2, "sharded"), (3, "sharded")):
        found = run(world_size, kind)
        np.testing.assert_array_equal(found.rank_U, expected.rank_U)
        np.testing.assert_array_equal(found.user_U, expected.user_U)
        assert found.metrics == expected.metrics
