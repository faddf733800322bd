"""A fresh table is a function of the seed and the row, so that any sharding of it starts from the same rows."""

import torch

from genatt_dist.embedding.ranking import Query
from genatt_dist.embedding.table import ReplicatedTable, initial_rows


def test_shards_of_a_fresh_table_are_its_rows() -> None:
    whole = initial_rows(0, 50, 6, 0.1, seed=4)
    parts = [initial_rows(first, count, 6, 0.1, seed=4) for first, count in ((0, 17), (17, 17), (34, 16))]
    assert torch.equal(torch.cat(parts), whole)
    assert not torch.equal(initial_rows(0, 50, 6, 0.1, seed=5), whole)


def test_fresh_rows_have_the_asked_spread_and_padding_is_zero() -> None:
    rows = initial_rows(0, 2000, 32, 0.02, seed=0)
    assert torch.equal(rows[0], torch.zeros(32))
    assert abs(rows[1:].std().item() / 0.02 - 1) < 0.02
    assert abs(rows[1:].mean().item()) < 4 * 0.02 / (1999 * 32) ** 0.5
    assert (initial_rows(1, 1, 32, 0.02, seed=0) != 0).all()


def test_lookup_and_ranking_see_the_same_rows() -> None:
    table = ReplicatedTable(30, 8, 1.0, seed=1)
    ids = torch.tensor([3, 30, 3])
    assert torch.equal(table.lookup(ids), table.weight[ids])
    none = torch.zeros(0, dtype=torch.int64)
    norms = (table.weight[1:] ** 2).sum(1)
    query = Query(table.weight[ids].detach(), none, none, ids)
    ranking = table.rank(query, 1, 7)
    assert norms.min() > 0
    expected = (query.states_BD @ table.weight[1:].T).argmax(1) + 1
    assert torch.equal(ranking.top_Bk[:, 0], expected)
