"""Tables of every kind that runs here hold after some steps what plain PyTorch makes of them in one process."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist
from torch import Tensor

from genatt_dist.config import TableConfig
from genatt_dist.embedding.options import Sharding
from genatt_dist.embedding.ranking import Query
from genatt_dist.embedding.sharded import ShardedTable
from genatt_dist.embedding.table import ITEM_TABLE, TableSpec, initial_rows, rank_rows, table_seed

pytestmark = pytest.mark.distributed

_ITEMS, _WIDTH, _SEED, _RATES = 40, 8, 5, (0.3, 0.1, 0.2)
_ROWS = {ITEM_TABLE: _ITEMS + 1, "genre": 7, "hour": 2}
_PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16}
# Largest difference of a weight: of fp32 by the order of sums, of fp16 by one rounding the other way a step, of weights
# below 4.
_BOUNDS = {"fp32": 2e-6, "fp16": len(_RATES) * 4 * 2.0**-11}


@dataclass(frozen=True)
class Case:
    """One configuration of the tables; `others` is how the two further tables are cut."""

    sharding: Sharding
    others: Sharding
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def config(self) -> TableConfig:
        return TableConfig(kind="sharded", sharding=self.sharding, init_std=0.5, **self.options)

    @property
    def specs(self) -> list[TableSpec]:
        return [
            TableSpec(name, rows, _WIDTH, 0.5, table_seed(_SEED, name), self.others)
            for name, rows in _ROWS.items()
            if name != ITEM_TABLE
        ]


_CUTS: tuple[tuple[Sharding, Sharding], ...] = (("row_wise", "table_wise"), ("table_wise", "auto"))
_CASES = [
    *(
        Case(sharding, others, {"optimizer": optimizer, "precision": precision})
        for optimizer, precision, (sharding, others) in itertools.product(
            ("rowwise_adagrad", "adagrad", "sgd"),
            _PRECISIONS,
            _CUTS,
        )
    ),
    *(
        Case("auto", "auto", {"weight_decay": 0.3, "weight_decay_mode": mode, "eps": 1e-3})
        for mode in ("l2", "decoupled")
    ),
]


def _ids(rank: int, step: int) -> dict[str, Tensor]:
    """Ids with repetitions, within a rank and between ranks; a rank and step without any of a table."""
    generator = torch.Generator().manual_seed(100 * step + rank)
    counts = {ITEM_TABLE: 30, "genre": 9 if rank != step else 0, "hour": 3}
    return {name: torch.randint(0, _ROWS[name], (count,), generator=generator) for name, count in counts.items()}


def _gradients(rank: int, step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7000 + 100 * step + rank)
    return {name: torch.randn(len(ids), _WIDTH, generator=generator) for name, ids in _ids(rank, step).items()}


def _by_product(cases: list[Case]) -> list[list[tuple[Any, ...]]]:
    """Each case's shards on this rank after the steps, as plain tuples."""
    found = []
    for case in cases:
        table = ShardedTable(
            _ITEMS, _WIDTH, case.config, learning_rate=1.0, seed=_SEED, device=torch.device("cpu"), others=case.specs
        )
        for step, rate in enumerate(_RATES):
            table.set_learning_rate(rate)
            rows = table.lookup_tables(_ids(dist.get_rank(), step))
            assert {row.dtype for row in rows.values()} == {torch.float32}
            gradients = _gradients(dist.get_rank(), step)
            torch.stack([(rows[name] * gradients[name]).sum() for name in rows]).sum().backward()
        found.append(
            [
                (s.name, s.first_row, s.rows.numpy(), {name: state.numpy() for name, state in s.optimizer.items()})
                for s in table.shards
            ]
        )
    return found


def _by_plain_pytorch(case: Case, world_size: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Rows and the optimizer's sums of squares of each table, after one update a step by the mean over ranks."""
    config, dtype = case.config, _PRECISIONS[case.config.precision]
    tables = {}
    for name, num_rows in _ROWS.items():
        rows = initial_rows(0, num_rows, _WIDTH, 0.5, table_seed(_SEED, name)).to(dtype).float()
        squares = torch.zeros(num_rows, _WIDTH)
        for step, rate in enumerate(_RATES):
            ids = torch.cat([_ids(rank, step)[name] for rank in range(world_size)])
            gradient = torch.zeros_like(rows).index_add_(
                0, ids, torch.cat([_gradients(rank, step)[name] for rank in range(world_size)]) / world_size
            )
            touched = torch.zeros(num_rows, 1).index_fill_(0, ids, 1)
            decay = config.weight_decay * touched
            if config.weight_decay_mode == "l2":
                gradient += decay * rows
            else:
                rows = rows * (1 - rate * decay)
            if config.optimizer != "sgd":
                square = gradient.square()
                squares += square.mean(1, keepdim=True) if config.optimizer == "rowwise_adagrad" else square
                gradient = gradient / (squares.sqrt() + config.eps)
            rows = (rows - rate * gradient).to(dtype).float()
        tables[name] = rows, squares
    return tables


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_tables_of_every_kind_equal_plain_pytorch(world_size: int) -> None:
    """On three ranks, table-wise kinds leave ranks without a row of some table or of any."""
    parts = ranks.run_in_group(_by_product, world_size, _CASES, seconds=240)
    for index, case in enumerate(_CASES):
        expected = _by_plain_pytorch(case, world_size)
        shards = [shard for part in parts for shard in part[index]]
        bound = _BOUNDS[case.config.precision]
        covered = dict.fromkeys(_ROWS, 0)
        for name, first, rows, optimizer in shards:
            assert rows.dtype == {"fp32": "float32", "fp16": "float16"}[case.config.precision]
            whole, squares = expected[name]
            covered[name] += len(rows)
            mine = slice(first, first + len(rows))
            difference = float((torch.from_numpy(rows).float() - whole[mine]).abs().max())
            assert difference <= bound, f"{case} table {name}: rows differ by {difference}"
            for state in optimizer.values():
                expected_state = squares[mine] if state.ndim == 2 else squares[mine, 0]
                torch.testing.assert_close(
                    torch.from_numpy(state), expected_state, rtol=2e-2 if bound > 1e-5 else 1e-5, atol=1e-6
                )
            assert bool(optimizer) == (case.config.optimizer != "sgd")
        assert covered == _ROWS


def _query() -> Query:
    generator = torch.Generator().manual_seed(2)
    states_BD, target_B = torch.randn(3, _WIDTH, generator=generator), torch.tensor([1, 17, _ITEMS])
    return Query(states_BD=states_BD, seen_row_S=torch.tensor([1]), seen_item_S=torch.tensor([4]), target_B=target_B)


def _ranked(cases: list[Case]) -> list[tuple[Any, ...]]:
    found = []
    for case in cases:
        table = ShardedTable(_ITEMS, _WIDTH, case.config, 1.0, _SEED, torch.device("cpu"))
        with torch.no_grad():
            ranking = table.rank(_query(), k=5, chunk=7)
        found.append((ranking.ahead_B.numpy(), ranking.top_Bk.numpy()))
    return found


def test_a_table_on_one_rank_or_of_lower_precision_ranks_as_its_rows_do() -> None:
    """Two ranks of three have no item."""
    cases = [Case("table_wise", "auto", {"precision": precision}) for precision in _PRECISIONS]
    for part in ranks.run_in_group(_ranked, 3, cases):
        for case, (ahead, top) in zip(cases, part, strict=True):
            rows = initial_rows(0, _ITEMS + 1, _WIDTH, 0.5, _SEED).to(_PRECISIONS[case.config.precision])
            expected = rank_rows(rows[1:].float(), _query(), 5, 7)
            assert ahead.tolist() == expected.ahead_B.tolist()
            assert top.tolist() == expected.top_Bk.tolist()
