"""A sharded table with managed collision trains, ranks and resumes equally on any number of ranks.

A run on the CPU is refused (fbgemm's managed collision is for CUDA); what happens is the same on both, so here that
check is left out.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ranks
import torch
import torch.distributed as dist
from joint_runs import Outcome, by_product, gather_rows, sharded_table
from test_resume import train, write_config

from genatt_dist.config import RunConfig
from genatt_dist.embedding import planner
from genatt_dist.embedding.table import MAP_TABLE, fresh_rows
from genatt_dist.serving.trained import load
from genatt_dist.training.checkpoint.bundle import export
from genatt_dist.training.checkpoint.read import Checkpoint
from genatt_dist.training.checkpoint.store import Store
from genatt_dist.training.checkpoint.tables import map_of_items, whole_table

pytestmark = pytest.mark.distributed

_MANAGED = "table.managed_collision={rows: 60, eviction_interval: 2}"
_EPOCHS = ("training.epochs=3", "training.optimizer=adamw", "training.learning_rate=0.005", "training.patience=9")


def _allowed(function: Callable[..., Any], *arguments: Any) -> Any:
    planner.check_device = lambda *_: None  # type: ignore[assignment]
    return function(*arguments)


def _observed(config: RunConfig) -> dict[str, Any]:
    table = sharded_table(config, 200)
    for state in table.optimizer_state.values():
        state += 3
    table.rows_VD[...] = 5
    offset, every = 10 * dist.get_rank(), []
    for _ in range(2):
        every.append(table.lookup(torch.tensor([1, 11, 150])).detach().numpy())
        table.observe(torch.arange(1, 11) + offset)
    return {
        "every": every,
        "rows": gather_rows(table).numpy(),
        "state": torch.cat(list(table.optimizer_state.values())).numpy(),
        "map": torch.cat([shard.rows for shard in table.shards if shard.name == MAP_TABLE]).numpy(),
    }


def test_rows_that_change_hands_start_afresh(make_config: Callable[..., RunConfig]) -> None:
    config = make_config(_MANAGED)
    found = ranks.run_in_group(_allowed, 2, _observed, config)
    owners = np.concatenate([part["map"][:, 0] for part in found])
    owners[0] = 0  # the padding row counts steps
    (taken,) = owners.nonzero()
    assert sorted(owners[taken]) == list(range(1, 21))
    rows, state = found[0]["rows"], np.concatenate([part["state"] for part in found])
    width, seed = config.model.hidden_size, config.training.seed
    fresh = fresh_rows(torch.from_numpy(taken), width, config.table.init_std, seed).numpy()
    np.testing.assert_array_equal(rows[taken], fresh)
    assert (np.delete(rows, taken, 0) == 5).all()
    assert (state[taken] == 0).all()
    assert (np.delete(state, taken) == 3).all()
    for part in found:
        before, after = part["every"]
        assert (before == 5).all()
        np.testing.assert_array_equal(after[:2], rows[[owners.tolist().index(1), owners.tolist().index(11)]])
        assert (after[2] == 5).all()


def test_updates_do_not_depend_on_the_number_of_ranks(make_config: Callable[..., RunConfig]) -> None:
    for loss in ("sampled", "gbce"):
        config = make_config(_MANAGED, f"loss.kind={loss}")
        (expected,) = ranks.run_in_group(_allowed, 1, by_product, config)
        found: Outcome = ranks.run_in_group(_allowed, 2, by_product, config)[0]
        assert found.table.shape == (61, 16)
        assert max(found.difference(expected)) < 2e-5


def _tensors(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    dense = checkpoint.dense()
    return dense | {"map": map_of_items(checkpoint), "rows": whole_table(checkpoint, "item", (61, 16))}


@pytest.mark.slow
def test_run_resumed_on_other_ranks_equals_the_run_that_never_stopped(
    make_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    """Saved between two changes of the map (10 updates an epoch, one change every 4): what was seen since then counts
    too. The bundle of the run then recommends as the run does.
    """
    config = make_config("table.managed_collision={rows: 60, eviction_interval: 4}", *_EPOCHS)
    whole, stopped = write_config(tmp_path / "whole", config), write_config(tmp_path / "stopped", config)
    ranks.run(_allowed, 2, train, whole)
    ranks.run(_allowed, 2, train, stopped, False, True)
    write_config(stopped, config.model_copy(update={"world_size": 1}))
    ranks.run(_allowed, 1, train, stopped, True)
    left, right = (_tensors(Store.of(run, config.training.checkpoint).newest()) for run in (whole, stopped))
    assert torch.equal(left["map"], right["map"])
    assert (left["map"][1:, 0] > 0).sum() == 59
    for name, value in left.items():
        torch.testing.assert_close(right[name], value, rtol=0, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")

    export(Store.of(whole, config.training.checkpoint).best(), str(tmp_path / "bundle"))
    served, bundled = load(whole), load(tmp_path / "bundle")
    ids = torch.arange(1, 201)
    rows = served.table.lookup(ids)
    torch.testing.assert_close(bundled.table.lookup(ids), rows, rtol=0, atol=0)
    assert len(rows.unique(dim=0)) == 60

    without = config.model_copy(update={"table": config.table.model_copy(update={"managed_collision": None})})
    shutil.copytree(whole, tmp_path / "other")
    write_config(tmp_path / "other", without)
    with pytest.raises(ranks.RankError, match=r"managed_collision=\{rows=60.*the configuration null"):
        ranks.run(_allowed, 2, train, tmp_path / "other", True)


def test_a_run_on_the_cpu_is_refused(make_config: Callable[..., RunConfig]) -> None:
    with pytest.raises(ranks.RankError, match="for CUDA only"):
        ranks.run_in_group(sharded_table, 1, make_config(_MANAGED), 200)
