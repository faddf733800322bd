"""The sharded table holds and ranks what the replicated one does, on any number of ranks; DeepSpeed leaves it alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import ranks
import torch
import torch.distributed as dist
from joint_runs import gather_rows, sharded_table

from data_pipeline.errors import GenattError
from genatt_dist.config import RunConfig
from genatt_dist.data.sequences import Sequences
from genatt_dist.embedding.ranking import Query, Ranking
from genatt_dist.embedding.table import ReplicatedTable, initial_rows
from genatt_dist.training.engine import Engine
from genatt_dist.training.step import DenseModel

pytestmark = pytest.mark.distributed

_VARIATIONAL = "model.attention={type: variational, rank: 4, latent_size: 6, generator_size: 12}"
# World sizes and catalogues: with the padding row, equal and unequal blocks, and rank 0 with that row alone.
_LAYOUTS = [(1, 200), (2, 200), (3, 200), (2, 3), (2, 2), (3, 2)]


def _engine_beside_table(config: RunConfig) -> dict[str, object]:
    ranks.partition_every_parameter()
    num_items = Sequences.read(config.data.path).num_items
    table = sharded_table(config, num_items)
    rows = table.rows_VD.clone()
    torch.manual_seed(config.training.seed)
    dense = DenseModel(config, num_items)
    before = {name: parameter.detach().clone() for name, parameter in dense.named_parameters()}
    engine = Engine(dense, config.training)
    after = engine.state()
    return {
        "rows equal": torch.equal(rows, table.rows_VD) and len(rows) > 0,
        "table is float32": table.rows_VD.dtype == torch.float32,
        "dense equal": all(torch.equal(value, after[f"parameter.{name}"]) for name, value in before.items()),
        "names": {name for name, _ in engine.module.named_parameters()},
        "expected names": set(before),
        "shapes": {tuple(value.shape) for value in before.values()},
    }


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_tables_untouched_by_deepspeed_initialize(make_config: Callable[..., RunConfig], stage: int) -> None:
    """DeepSpeed broadcasts and (in bfloat16) casts every parameter it is given: the table must not be among them."""
    config = make_config(_VARIATIONAL, f"training.zero_stage={stage}")
    for found in ranks.run_in_group(_engine_beside_table, 2, config):
        assert found["rows equal"]
        assert found["dense equal"]
        assert found["names"] == found["expected names"]
        assert not any("item" in name for name in found["names"])
        assert (201, 16) not in found["shapes"]


def test_tables_stay_float32_beside_a_bfloat16_engine(make_config: Callable[..., RunConfig]) -> None:
    for found in ranks.run_in_group(_engine_beside_table, 2, make_config("training.precision=bf16")):
        assert found["rows equal"]
        assert found["table is float32"]


def _query(num_items: int, width: int, users: int = 8) -> Query:
    """Users with 0, 1, 2 … seen items; one has seen its own target, which then ranks last."""
    generator = torch.Generator().manual_seed(3)
    seen = [1 + torch.randperm(num_items, generator=generator)[: user % (num_items + 1)] for user in range(users)]
    target_B = torch.randint(1, num_items + 1, (users,), generator=generator)
    target_B[-1] = seen[-1][0] if len(seen[-1]) else target_B[-1]
    return Query(
        states_BD=torch.randn(users, width, generator=generator),
        seen_row_S=torch.cat([torch.full_like(items, user) for user, items in enumerate(seen)]),
        seen_item_S=torch.cat(seen),
        target_B=target_B,
    )


def _part(query: Query, first: int, end: int) -> Query:
    """The users first … end − 1, numbered from 0."""
    mine = (query.seen_row_S >= first) & (query.seen_row_S < end)
    return Query(
        query.states_BD[first:end],
        query.seen_row_S[mine] - first,
        query.seen_item_S[mine],
        query.target_B[first:end],
    )


def _ranked(config: RunConfig, num_items: int, k: int, chunk: int) -> dict[str, np.ndarray]:
    table = sharded_table(config, num_items)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    whole = _query(num_items, config.model.hidden_size)
    # Uneven: rank 0 has most of the users, the others one each.
    bounds = [0, *range(len(whole.target_B) - world_size + 1, len(whole.target_B) + 1)]
    ranking = table.rank(_part(whole, bounds[rank], bounds[rank + 1]), k, chunk)
    ids = torch.tensor([num_items, 1, num_items // 2 + 1, 1])[: 4 - rank]
    return {
        "rows": gather_rows(table).numpy(),
        "ahead": ranking.ahead_B.numpy(),
        "top": ranking.top_Bk.numpy(),
        "score": ranking.score_Bk.numpy(),
        "looked up": table.lookup(ids).detach().numpy(),
        "ids": ids.numpy(),
    }


@pytest.mark.parametrize(("world_size", "num_items"), _LAYOUTS)
def test_sharded_table_equals_the_replicated_one(
    make_config: Callable[..., RunConfig], world_size: int, num_items: int
) -> None:
    config = make_config()
    width, std, seed, k, chunk = config.model.hidden_size, config.table.init_std, config.training.seed, 10, 32
    replicated = ReplicatedTable(num_items, width, std, seed)
    with torch.no_grad():
        expected: Ranking = replicated.rank(_query(num_items, width), k, chunk)
    found = ranks.run_in_group(_ranked, world_size, config, num_items, k, chunk)

    for part in found:
        np.testing.assert_array_equal(part["rows"], initial_rows(0, num_items + 1, width, std, seed).numpy())
        np.testing.assert_array_equal(part["looked up"], replicated.weight[part["ids"]].detach().numpy())
    np.testing.assert_array_equal(np.concatenate([part["ahead"] for part in found]), expected.ahead_B.numpy())
    np.testing.assert_array_equal(np.concatenate([part["top"] for part in found]), expected.top_Bk.numpy())
    np.testing.assert_allclose(
        np.concatenate([part["score"] for part in found]), expected.score_Bk.numpy(), rtol=0, atol=1e-6
    )


def test_seen_items_are_not_recommended_by_a_sharded_table(make_config: Callable[..., RunConfig]) -> None:
    config = make_config()
    query = _query(num_items=200, width=config.model.hidden_size)
    top_Bk = np.concatenate([part["top"] for part in ranks.run_in_group(_ranked, 2, config, 200, 200, 64)])
    for user, top in enumerate(top_Bk):
        seen = set(query.seen_item_S[query.seen_row_S == user].tolist())
        assert set(top.tolist()) - {0} == set(range(1, 201)) - seen


def _ranked_with_all_items(config: RunConfig) -> tuple[np.ndarray, np.ndarray]:
    whole, nothing = _query(200, config.model.hidden_size), torch.empty(0, dtype=torch.int64)
    ranking = sharded_table(config, 200).rank(replace(whole, seen_row_S=nothing, seen_item_S=nothing), 10, 64)
    return ranking.ahead_B.numpy(), ranking.top_Bk.numpy()


def test_no_rank_has_an_item_to_leave_out(make_config: Callable[..., RunConfig]) -> None:
    """`evaluation.exclude_seen=false`: what the ranks gather is empty."""
    config = make_config()
    table = ReplicatedTable(200, config.model.hidden_size, config.table.init_std, config.training.seed)
    whole, nothing = _query(200, config.model.hidden_size), torch.empty(0, dtype=torch.int64)
    with torch.no_grad():
        expected = table.rank(replace(whole, seen_row_S=nothing, seen_item_S=nothing), 10, 64)
    for ahead, top in ranks.run_in_group(_ranked_with_all_items, 2, config):
        np.testing.assert_array_equal(ahead, expected.ahead_B.numpy())
        np.testing.assert_array_equal(top, expected.top_Bk.numpy())


def _refused(config: RunConfig, num_items: int) -> str:
    with pytest.raises(GenattError) as error:
        sharded_table(config, num_items)
    return str(error.value)


def test_more_ranks_than_rows_are_refused(make_config: Callable[..., RunConfig]) -> None:
    """Four rows on three ranks are 2, 2 and none. Every rank says so; none waits for another."""
    for error in ranks.run_in_group(_refused, 3, make_config(), 3):
        assert "3 items are too few for world_size=3" in error


def test_updates_are_counted_without_evaluations(make_config: Callable[..., RunConfig]) -> None:
    """fbgemm counts lookups; what its Adam reads is set before each update instead."""
    assert ranks.run_in_group(count_after_lookups, 2, make_config(), 7) == [[8], [8]]


def count_after_lookups(config: RunConfig, updates: int) -> list[int]:
    """fbgemm's count in the lookup of update number `updates` + 1, after others."""
    from fbgemm_gpu.split_table_batched_embeddings_ops_training import SplitTableBatchedEmbeddingBagsCodegen

    table = sharded_table(config, 200)
    ids = torch.arange(1, 9)
    with torch.no_grad():
        table.lookup(ids)
        table.lookup(ids)
    table.set_updates(updates)
    table.lookup(ids)
    lists = [getattr(module, "_lookups", ()) for module in table._model.modules()]
    kernels = [kernel for lookups in lists for lookup in lookups for kernel in lookup.modules()]
    return [int(kernel.iter_cpu) for kernel in kernels if isinstance(kernel, SplitTableBatchedEmbeddingBagsCodegen)]
