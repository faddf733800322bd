"""Managed collision: who gets a row, who loses it, and ranking through the map, in one process."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from tiny_data import run_config

from data_pipeline.errors import GenattError
from genatt_dist.embedding.managed import ManagedRows, ManagedTable
from genatt_dist.embedding.options import ManagedCollision, TableConfig, check_device
from genatt_dist.embedding.ranking import Filter, Query
from genatt_dist.embedding.table import ReplicatedTable, fresh_rows, initial_rows, item_spec, rank_rows

_CPU = torch.device("cpu")
_FOUR = {"rows": 4, "eviction_interval": 1}


def _managed(num_items: int = 20, **options: Any) -> ManagedRows:
    return ManagedRows(ManagedCollision(**options), num_items, _CPU)


def _observe(managed: ManagedRows, items: list[int]) -> list[int] | None:
    """The rows that changed hands, sorted."""
    changed_E = managed.observe(torch.tensor(items))
    return None if changed_E is None else sorted(changed_E.tolist())


def _owners(managed: ManagedRows) -> set[int]:
    return set(managed.owners_R.tolist()) - {0}


def test_fewer_rows_than_items_on_cuda_and_refused_on_the_cpu() -> None:
    config = TableConfig(kind="sharded", managed_collision=ManagedCollision(rows=30))
    assert item_spec(1000, 8, config, 0).rows == 31
    check_device(config, "cuda")
    with pytest.raises(GenattError, match=r"for CUDA only.*--hash-buckets"):
        check_device(config, "cpu")


def test_combinations_that_cannot_work_are_refused(tmp_path: Any) -> None:
    with pytest.raises(ValidationError, match=r"drop table\.managed_collision"):
        TableConfig(managed_collision=ManagedCollision(rows=30))
    with pytest.raises(GenattError, match=r"drop table\.managed_collision, or use loss\.kind=sampled"):
        run_config(tmp_path, table={"kind": "sharded", "managed_collision": {"rows": 30}}, loss={"kind": "full"})


def test_items_share_the_last_row_until_they_have_their_own() -> None:
    managed = _managed(rows=4, eviction_interval=2)
    assert managed.rows_of(torch.tensor([7, 9, 7])).tolist() == [4, 4, 4]
    first = _observe(managed, [7])
    assert first == managed.rows_of(torch.tensor([7])).tolist()
    assert _observe(managed, [7, 9]) is None
    second = _observe(managed, [7, 11])
    assert second is not None
    assert sorted(first + second) == [1, 2, 3]
    assert _owners(managed) == {7, 9, 11}
    rows = managed.rows_of(torch.tensor([7, 9, 11, 3])).tolist()
    assert rows[:1] == first
    assert sorted(rows[1:3]) == second
    assert rows[3] == 4
    assert managed.owners_R.tolist().index(9) == rows[1]


def test_lfu_keeps_the_most_frequent_and_lru_the_latest() -> None:
    for policy, expected in (("lfu", {7, 9, 12}), ("lru", {9, 12, 13})):
        managed = _managed(policy=policy, **_FOUR)
        _observe(managed, [7] * 5 + [9] * 3 + [11])
        before = managed.owners_R.tolist()
        changed = _observe(managed, [12, 12, 9] + ([13] if policy == "lru" else []))
        assert _owners(managed) == expected
        assert changed == sorted(before.index(gone) for gone in {7, 9, 11} - expected)
        assert managed.owners_R.tolist().index(9) == before.index(9)


def test_distance_lfu_forgets_what_was_frequent_long_ago() -> None:
    managed = _managed(policy="distance_lfu", **_FOUR)
    _observe(managed, [7] * 6)
    for _ in range(4):
        _observe(managed, [9, 9, 11, 11])
    _observe(managed, [12, 12])
    assert _owners(managed) == {9, 11, 12}


def test_any_number_of_items_may_come_in_a_step() -> None:
    """The library sizes its history by the first batch and drops what is more."""
    managed = _managed(rows=20, eviction_interval=1)
    _observe(managed, [1])
    _observe(managed, list(range(2, 20)))
    assert _owners(managed) == set(range(1, 20))


def _query(num_items: int, width: int, only: Filter | None = None) -> Query:
    generator = torch.Generator().manual_seed(5)
    return Query(
        torch.randn(6, width, generator=generator),
        torch.tensor([0, 0, 1, 3, 3]),
        torch.tensor([2, 7, 20, 9, 1]),
        torch.randint(1, num_items + 1, (6,), generator=generator),
        only,
    )


@pytest.mark.parametrize("filtered", [False, True])
def test_ranking_is_that_of_the_items_with_rows(filtered: bool) -> None:
    num_items, width = 20, 8
    managed = _managed(num_items, rows=9, eviction_interval=1)
    _observe(managed, [3, 3, 20, 9, 2, 7])
    table = ReplicatedTable(9, width, 1.0, 0)
    found_table = ManagedTable(table, managed)
    only = Filter(torch.zeros(6, dtype=torch.int64), lambda ids_C: (ids_C % 2 == 1)[None]) if filtered else None
    query = _query(num_items, width, only)
    query.target_B[:3] = torch.tensor([3, 9, 11])
    with torch.no_grad():
        found = found_table.rank(query, 4, 3)
        # The same by items: those without a row of their own are left out.
        rows_VD = found_table.lookup(torch.arange(1, num_items + 1))
        owned_V = torch.tensor([item in (2, 3, 7, 9, 20) for item in range(num_items + 1)])
        inner = only.allowed if only else lambda ids_C: torch.ones(1, len(ids_C), dtype=torch.bool)
        owned = Filter(torch.zeros(6, dtype=torch.int64), lambda ids_C: owned_V[ids_C] & inner(ids_C))
        expected = rank_rows(rows_VD, replace(query, only=owned), 4, 7)
    assert torch.equal(found.top_Bk, expected.top_Bk)
    torch.testing.assert_close(found.score_Bk, expected.score_Bk)
    counted_B = owned.allowed(query.target_B)[0]
    top_B = (expected.top_Bk == query.target_B[:, None]).any(1)
    assert torch.equal(found.ahead_B[top_B], expected.ahead_B[top_B])
    without_B = ~owned_V[query.target_B]
    assert (found.ahead_B[without_B] == num_items).all()
    assert counted_B.any()
    assert without_B.any()


def test_fresh_rows_are_those_of_a_fresh_table() -> None:
    whole = initial_rows(0, 50, 12, 0.3, seed=4)
    picked = torch.tensor([7, 49, 1])
    assert torch.equal(fresh_rows(picked, 12, 0.3, 4), whole[picked])
