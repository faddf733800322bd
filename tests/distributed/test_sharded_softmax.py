"""The full softmax over a sharded table is the one of one process: lookups and scores of a row are one update."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import ranks
import torch
import torch.distributed as dist
from joint_runs import by_plain_pytorch, by_product

from genatt_dist.config import RunConfig, TableConfig
from genatt_dist.embedding.sharded import ShardedTable
from genatt_dist.embedding.summed import SummedUpdate
from genatt_dist.embedding.table import ITEM_TABLE, TableSpec
from genatt_dist.loss.full import full_loss, full_nll

pytestmark = pytest.mark.distributed

FULL = "loss.kind=full"
SAMPLES = "model.attention={type: variational, rank: 4, latent_size: 6, generator_size: 12, train_samples: 2}"
DIFFUSION = "model.attention={type: diffusion, rank: 4, latent_size: 6, generator_size: 12, diffusion_steps: 6}"
LAST = "data.targets=last"
ACCUMULATED = "training.accumulation_steps=2"
# Adagrad divides a gradient by the root of its own squares, so where it is nearly zero its rounding error becomes part
# of a step as long as the learning rate, 0.1: a thousandth of that is allowed. Over whole rows it averages out.
TOLERANCES = {"sgd": 1e-6, "rowwise_adagrad": 1e-6, "adagrad": 1e-4}


def _optimizer(name: str) -> str:
    return f"table.optimizer={name}"


def _stage(stage: int) -> str:
    return f"training.zero_stage={stage}"


def _claim(config: RunConfig, world_size: int) -> None:
    reference = by_plain_pytorch(config)
    found = ranks.run_in_group(by_product, world_size, config)
    assert np.isfinite(reference.losses).all()
    for one in found:
        differences = one.difference(reference)
        print("largest differences of losses, dense tensors, rows:", *(f"{value:.1e}" for value in differences))
        assert max(differences) <= TOLERANCES[config.table.optimizer]
    assert reference.state.size or config.table.optimizer == "sgd"


@pytest.mark.parametrize(
    ("world_size", "overrides"),
    [
        (1, (_optimizer("adagrad"), _stage(0))),
        (2, (_optimizer("rowwise_adagrad"), SAMPLES, _stage(1))),
        (2, (_optimizer("sgd"), DIFFUSION, LAST, _stage(3))),
        (3, (_optimizer("adagrad"), _stage(2), ACCUMULATED)),
    ],
    ids=lambda value: str(value) if isinstance(value, int) else None,
)
def test_sharded_full_softmax_follows_plain_pytorch(
    make_config: Callable[..., RunConfig], world_size: int, overrides: tuple[str, ...]
) -> None:
    _claim(make_config(FULL, *overrides), world_size)


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("stage", "world_size", "attention"), [(0, 3, SAMPLES), (1, 2, DIFFUSION), (2, 1, SAMPLES), (3, 2, SAMPLES)]
)
@pytest.mark.parametrize("optimizer", ["sgd", "adagrad", "rowwise_adagrad"])
def test_every_optimizer_follows_plain_pytorch(
    make_config: Callable[..., RunConfig], optimizer: str, stage: int, world_size: int, attention: str
) -> None:
    _claim(make_config(FULL, _optimizer(optimizer), _stage(stage), attention), world_size)


def _fused_and_summed(optimizers: tuple[str, ...]) -> list[tuple[str, float]]:
    """By optimizer: the largest difference of rows and states between TorchRec's own update and the summed one."""
    results = []
    for optimizer in optimizers:
        config = TableConfig(kind="sharded", optimizer=optimizer, init_std=0.5)  # type: ignore[arg-type]
        tables = [ShardedTable(9, D, config, 0.1, 0, torch.device("cpu")) for _ in range(2)]
        summed = SummedUpdate(tables[1], config)
        for step in range(3):
            draw = torch.Generator().manual_seed(10 * step + dist.get_rank())
            ids = torch.randint(1, 10, (5 + dist.get_rank(),), generator=draw)
            weight = torch.randn(len(ids), D, generator=draw)
            for table, lookup in zip(tables, (tables[0].lookup, summed.lookup), strict=True):
                table.set_learning_rate(0.1 / (1 + step))
                (lookup(ids) * weight).sum().backward()
            summed.update()
        fused, ours = ([table.rows_VD, *table.optimizer_state.values()] for table in tables)
        assert len(fused) == len(ours)
        results.append((optimizer, max(float((a - b).abs().max()) for a, b in zip(fused, ours, strict=True))))
    return results


def test_the_summed_update_is_the_fused_one() -> None:
    """Lookups alone, with ids that repeat on a rank and on both: formula, state and average are the same."""
    for found in ranks.run_in_group(_fused_and_summed, 2, ("sgd", "adagrad", "rowwise_adagrad")):
        assert len(found) == 3
        for optimizer, difference in found:
            assert difference <= 1e-6, optimizer


def _without_values() -> tuple[bool, bool]:
    """Whether an update moved the items looked up, and a table of which no rank looked up a row."""
    config = TableConfig(kind="sharded", optimizer="sgd")
    table = ShardedTable(9, D, config, 0.1, 0, torch.device("cpu"), [TableSpec("genre", 7, D, 0.5, 1)])
    summed, before = SummedUpdate(table, config), {shard.name: shard.rows.clone() for shard in table.shards}
    nothing = torch.empty(0, dtype=torch.int64)
    rows = summed.lookup_tables({ITEM_TABLE: torch.arange(1, 10), "genre": nothing})
    (rows[ITEM_TABLE].sum() + rows["genre"].sum()).backward()
    summed.update()
    moved = {shard.name for shard in table.shards if not torch.equal(shard.rows, before[shard.name])}
    return ITEM_TABLE in moved, "genre" in moved


def test_a_table_may_be_asked_for_no_row() -> None:
    assert ranks.run_in_group(_without_values, 2) == [(True, False)] * 2


# --- the loss alone ---------------------------------------------------------------------------------------------------

V, D, N = 13, 8, 9
CHUNKS = (1, 4, 100)
# Rows of each rank: even ones, rank 0 with the padding row alone, a rank with none.
CUTS = [(0, 14), (0, 7, 14), (0, 1, 14), (0, 5, 10, 14), (0, 7, 7, 14)]


def _case() -> tuple[torch.Tensor, ...]:
    draw = torch.Generator().manual_seed(5)
    table = torch.randn(V + 1, D, generator=draw)
    states = torch.randn(N, D, generator=draw)
    targets = torch.randint(1, V + 1, (N,), generator=draw)
    return table, states, targets, torch.rand(N, generator=draw) + 0.1


def _sharded(cuts: tuple[int, ...], dtype: torch.dtype) -> list[dict[str, np.ndarray]]:
    """One rank's part for each chunk size: uneven ones, the last rank has no target when there are three."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    table, states, targets, weight = _case()
    bounds = {1: (0, N), 2: (0, 2, N), 3: (0, 4, N, N)}[world_size]
    here = slice(bounds[rank], bounds[rank + 1])
    results = []
    for chunk in CHUNKS:
        rows = table[cuts[rank] : cuts[rank + 1]].clone().requires_grad_()
        mine = states[here].to(dtype).requires_grad_()
        given = (mine, rows, targets[here])
        where = (chunk, int(rank == 0), cuts[rank])
        loss = full_loss(*given, weight[here], *where)
        (3 * loss).backward()
        with torch.no_grad():
            alone = full_loss(*given, weight[here], *where)
        nll = full_nll(*given, *where)
        assert rows.grad is not None
        assert mine.grad is not None
        assert mine.grad.dtype == dtype
        found = {"loss": loss.detach(), "alone": alone, "rows": rows.grad, "states": mine.grad.float(), "nll": nll}
        results.append({name: value.numpy() for name, value in found.items()})
    return results


@pytest.mark.parametrize("cuts", CUTS, ids=str)
def test_loss_and_gradients_are_those_of_the_whole_table(cuts: tuple[int, ...]) -> None:
    table, states, targets, weight = _case()
    table.requires_grad_(), states.requires_grad_()
    expected = full_loss(states, table, targets, weight, 4, 1)
    (3 * expected).backward()
    assert table.grad is not None
    assert states.grad is not None
    wanted = {"rows": table.grad.numpy(), "states": states.grad.numpy(), "nll": full_nll(states, table, targets, 4, 1)}
    for parts in zip(*ranks.run_in_group(_sharded, len(cuts) - 1, cuts, torch.float32), strict=True):
        for name, value in wanted.items():
            found = np.concatenate([part[name] for part in parts])
            np.testing.assert_allclose(found, value, rtol=1e-5, atol=2e-6, err_msg=name)
        for name in ("loss", "alone"):
            assert sum(part[name] for part in parts) == pytest.approx(expected.item(), rel=1e-6)


def test_bfloat16_states_stay_near_float32() -> None:
    """Two per cent of the gradients' norm: bf16 keeps 8 bits of each factor. The rows' gradients are float32."""
    exact = ranks.run_in_group(_sharded, 2, CUTS[1], torch.float32)
    found = ranks.run_in_group(_sharded, 2, CUTS[1], torch.bfloat16)
    for (one, *_), (other, *_) in zip(found, exact, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=0.02)
        for name in ("rows", "states"):
            assert np.linalg.norm(one[name] - other[name]) < 0.02 * np.linalg.norm(other[name])


def test_a_bfloat16_model_stays_near_float32(make_config: Callable[..., RunConfig]) -> None:
    """Losses within 2 % over all steps; the table and its update stay float32."""
    reference = by_plain_pytorch(make_config(FULL))
    for found in ranks.run_in_group(by_product, 2, make_config(FULL, "training.precision=bf16")):
        np.testing.assert_allclose(found.losses, reference.losses, rtol=0.02)
        assert found.table.dtype == np.float32


def test_half_precision_rows_follow_plain_pytorch(make_config: Callable[..., RunConfig]) -> None:
    """Rounded to 11 bits after every update; gradients and the optimizer's state stay float32."""
    config = make_config(FULL, "table.precision=fp16", _optimizer("rowwise_adagrad"))
    reference = by_plain_pytorch(config)
    found, _ = ranks.run_in_group(by_product, 2, config)
    assert found.table.dtype == np.float16
    assert found.state.dtype == np.float32
    np.testing.assert_allclose(found.losses, reference.losses, rtol=2e-3)
    assert np.abs(found.table - reference.table).max() < 5e-3
