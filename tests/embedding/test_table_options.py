"""What a `table:` section may ask for, and what the planner makes of it without a process group or a device."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from data_pipeline.errors import GenattError
from genatt_dist.config import TableConfig
from genatt_dist.embedding.options import check_device
from genatt_dist.embedding.planner import bytes_of, plan
from genatt_dist.embedding.table import TableSpec, fill_initial_rows, initial_rows, item_spec, table_seed

_GIB = 1 << 30
_DEVICES = {"cuda": 80 * _GIB, "cpu": 16 * _GIB}


def _sharded(**options: Any) -> TableConfig:
    return TableConfig(kind="sharded", **options)


def _planned(specs: list[TableSpec], config: TableConfig, world_size: int, device: str) -> dict[str, list[Any]]:
    """By table, each part's (rank, first row, rows, first column, columns), in order."""
    made = plan(specs, config, world_size, min(8, world_size), device, _DEVICES[device]).plan[""]
    return {
        spec.name: [
            (
                shard.placement.rank(),
                shard.shard_offsets[0],
                shard.shard_sizes[0],
                shard.shard_offsets[1],
                shard.shard_sizes[1],
            )
            for shard in made[spec.name].sharding_spec.shards  # type: ignore[index, attr-defined]
        ]
        for spec in specs
    }


def test_a_table_for_1024_gpus_is_planned_in_seconds_on_this_machine() -> None:
    spec = item_spec(1_000_000_000, 128, _sharded(), seed=0)
    began = time.perf_counter()
    parts = _planned([spec], _sharded(optimizer="adam", precision="bf16"), 1024, "cuda")["item"]
    assert time.perf_counter() - began < 30
    assert [part[0] for part in parts] == list(range(1024))
    assert sum(part[2] for part in parts) == 1_000_000_001
    assert max(part[2] for part in parts) == -(-1_000_000_001 // 1024)


@pytest.mark.parametrize("sharding", ["row_wise", "table_wise", "column_wise"])
@pytest.mark.parametrize("optimizer", ["adagrad", "adam"])
def test_every_kind_of_torchrec_is_planned_for_cuda(sharding: Any, optimizer: str) -> None:
    """The kernels of column-wise tables and of Adam exist on CUDA only: this shows the plan, not a step."""
    features = [TableSpec(name, 5000, 64, 0.02, table_seed(0, name), sharding) for name in ("genre", "brand")]
    config = _sharded(optimizer=optimizer)
    parts = _planned([item_spec(100_000, 64, config, 0), *features], config, 4, "cuda")
    for spec in features:
        assert sum(rows * columns for _, _, rows, _, columns in parts[spec.name]) == 5000 * 64
        if sharding == "table_wise":
            assert len(parts[spec.name]) == 1
        if sharding == "row_wise":
            assert [part[1] for part in parts[spec.name]] == [0, 1250, 2500, 3750]
        if sharding == "column_wise":
            assert {part[2] for part in parts[spec.name]} == {5000}


def test_item_rows_go_to_every_rank_and_small_tables_fit_somewhere() -> None:
    config = _sharded()
    small = TableSpec("hour", 3, 64, 0.02, table_seed(0, "hour"))
    parts = _planned([item_spec(1000, 64, config, 0), small], config, 4, "cpu")
    assert [part[0] for part in parts["item"]] == [0, 1, 2, 3]
    assert len(parts["hour"]) == 1


def test_tables_that_do_not_fit_are_told_with_their_sizes() -> None:
    config = _sharded(optimizer="adagrad")
    spec = item_spec(100_000_000, 128, config, 0)
    assert sum(bytes_of(spec, config)) == pytest.approx(100_000_001 * 128 * 8)
    with pytest.raises(GenattError, match=r"item 95\.4 GiB\) do not fit 2 ranks of 16 GiB: raise world_size"):
        _planned([spec], config, 2, "cpu")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sharding": "grid_shard"}, "EmbeddingBagCollection"),
        ({"sharding": "column_wise"}, "whole row in one place"),
        ({"sharding": "data_parallel"}, "table.kind=replicated"),
        ({"weight_decay": 0.1, "optimizer": "sgd"}, "leaves weight_decay out"),
        ({"max_norm": 1.0, "optimizer": "adagrad"}, "leaves max_norm out"),
        ({"weight_decay_mode": "decoupled"}, "set weight_decay too"),
        ({"kind": "replicated", "precision": "fp16"}, "drop table.precision"),
        ({"kind": "replicated", "weight_decay": 0.1}, "drop table.weight_decay"),
    ],
)
def test_a_section_that_cannot_work_is_refused_when_read(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        TableConfig(**({"kind": "sharded"} | options))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"optimizer": "adam"}, "on CUDA only; use rowwise_adagrad, adagrad, sgd"),
        ({"optimizer": "partial_rowwise_adam"}, "on CUDA only"),
        ({"precision": "bf16"}, "use fp16 or fp32"),
        ({"max_norm": 1.0}, "leaves it out there"),
    ],
)
def test_what_only_cuda_can_do_is_refused_on_the_cpu(options: dict[str, Any], words: str) -> None:
    config = _sharded(**options)
    check_device(config, "cuda")
    with pytest.raises(GenattError, match=words):
        check_device(config, "cpu")
    with pytest.raises(GenattError, match=words):
        plan([item_spec(100, 8, config, 0)], config, 2, 2, "cpu", _GIB)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (TableSpec("brand", 100, 8, 0.02, 1, "column_wise"), "sharding=column_wise on cpu"),
        (TableSpec("brand", 4, 8, 0.02, 1, "row_wise"), "some rank would hold no row"),
    ],
)
def test_tables_that_the_cpu_cannot_cut_so_are_refused(spec: TableSpec, words: str) -> None:
    with pytest.raises(GenattError, match=words):
        plan([spec], _sharded(), 3, 3, "cpu", _GIB)


def test_columns_of_a_row_wise_optimizer_are_refused() -> None:
    spec = TableSpec("brand", 100, 8, 0.02, 1, "column_wise")
    with pytest.raises(GenattError, match="depend on the number of ranks"):
        plan([spec], _sharded(), 2, 2, "cuda", 80 * _GIB)


def test_any_part_of_a_fresh_table_is_that_part_of_the_whole() -> None:
    whole = initial_rows(0, 50, 12, 0.3, seed=4)
    part = torch.full((20, 4), torch.nan, dtype=torch.float16)
    fill_initial_rows(part, first_row=7, first_column=8, width=12, std=0.3, seed=4)
    torch.testing.assert_close(part, whole[7:27, 8:].half(), rtol=0, atol=0)
    assert not whole[0].any()
    assert whole[1:].std() == pytest.approx(0.3, rel=0.1)
    other = initial_rows(0, 50, 12, 0.3, table_seed(4, "genre"))
    assert not torch.equal(whole, other)
    assert table_seed(4, "item") == 4
