"""Under Ray Train, however Ray deals the rows: each once an epoch, in equally many batches on every rank."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from tiny_data import all_windows, histories, numbered, write_prepared

from data_pipeline.errors import GenattError
from data_pipeline.local_ray import local_ray
from genatt_dist.config import DataConfig, TrainingConfig
from genatt_dist.data.batches import Part, TrainingBatches
from genatt_dist.data.ray_dataset import every_row, ray_dataset, schema
from genatt_dist.data.ray_feed import RayBatches, all_gathered
from genatt_dist.data.sequences import Sequences

DATA = DataConfig(path="-", max_len=6, windows="all", shuffle_windows=100)


def rows_of(plan: TrainingBatches) -> pa.Table:
    windows = all_windows(plan)
    lists = [plan.sequences.take(windows.start_B[[i]], windows.length_B[[i]] + 1)[0] for i in range(len(windows))]
    return pa.table(
        [windows.id_B, pa.array([one.tolist() for one in lists], schema(False).field("items").type)],
        schema=schema(False),
    )


class Ranks:
    """Runs a function on several threads, each a rank, that meet in `exchange`."""

    def __init__(self, world_size: int) -> None:
        self._barrier, self._values = threading.Barrier(world_size, timeout=20), [None] * world_size
        self._size, self._rank = world_size, threading.local()

    def exchange(self, value: Any) -> list[Any]:
        self._barrier.wait()
        self._values[self._rank.number] = value
        self._barrier.wait()
        return list(self._values)

    def run(self, function: Any) -> list[Any]:
        def one(rank: int) -> Any:
            self._rank.number = rank
            return function(rank)

        with ThreadPoolExecutor(self._size) as pool:
            return list(pool.map(one, range(self._size)))


def parts_of(plan: TrainingBatches, dealt: list[pa.Table], epoch: int) -> list[list[Part]]:
    """The parts of each rank when Ray deals each these rows, in blocks of 7."""
    ranks = Ranks(len(dealt))
    feed = RayBatches(plan, ranks.exchange)

    def blocks(rows: pa.Table) -> Iterator[pa.Table]:
        return (rows.slice(low, 7) for low in range(0, len(rows), 7))

    return ranks.run(lambda rank: list(feed.parts(blocks(dealt[rank]), epoch, rank, len(dealt))))


@pytest.fixture(scope="module")
def plan() -> TrainingBatches:
    lengths = (3 + np.random.default_rng(0).geometric(0.1, 150)).tolist()
    return TrainingBatches.plan(numbered(lengths), DATA, TrainingConfig(batch_sequences=12))


@pytest.mark.parametrize("shares", [[1.0], [0.5, 0.5], [1.0, 0.0], [0.03, 0.97], [0.2, 0.1, 0.7]])
def test_every_row_is_in_one_batch_whatever_ray_deals(shares: list[float], plan: TrainingBatches) -> None:
    rows, world_size = rows_of(plan), len(shares)
    cuts = np.round(np.cumsum([0, *shares]) * len(rows)).astype(int)
    dealt = [rows.slice(low, high - low) for low, high in pairwise(cuts.tolist())]
    expected = dict(zip(rows["window"].to_pylist(), rows["items"].to_pylist(), strict=True))
    orders = []
    for epoch in range(2):
        found = parts_of(plan, dealt, epoch)
        assert {len(parts) for parts in found} == {plan.num_batches}
        assert min(len(part.windows) for parts in found for part in parts) >= 1
        seen: dict[int, list[int]] = {}
        for of_ranks in zip(*found, strict=True):
            for part in of_ranks:
                assert part.sequences == sum(len(one.windows) for one in of_ranks)
                assert part.tokens == sum(one.windows.length_B.sum() for one in of_ranks)
                lists = np.split(part.items, np.cumsum(part.windows.length_B + 1)[:-1])
                batch = dict(zip(part.windows.id_B.tolist(), [one.tolist() for one in lists], strict=True))
                assert not seen.keys() & batch.keys()
                seen |= batch
        assert seen == expected
        assert [part.sequences for part in found[0]] == [part.sequences for part in found[world_size - 1]]
        orders.append([part.windows.id_B.tolist() for part in found[0]])
    assert orders[0] != orders[1]


def test_rows_that_are_lost_or_too_many_are_an_error(plan: TrainingBatches) -> None:
    rows = rows_of(plan)
    with pytest.raises(GenattError, match=r"Ray gave 5 rows less than the \d+ windows of the plan"):
        parts_of(plan, [rows.slice(0, 20), rows.slice(25)], 0)
    with pytest.raises(GenattError, match=r"Ray gave more rows than the \d+ windows of the plan"):
        parts_of(plan, [pa.concat_tables([rows, rows.slice(0, 1)])], 0)


def test_more_ranks_than_sequences_of_a_batch_is_an_error(plan: TrainingBatches) -> None:
    with pytest.raises(GenattError, match="a global batch of 11 sequences for 13 ranks"):
        list(RayBatches(plan, lambda value: [value]).parts(iter([]), 0, 0, 13))


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    with local_ray(num_cpus=3):
        yield


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("world_size", [pytest.param(1, marks=pytest.mark.exhaustive), 2])
def test_ray_train_trains_each_row_once_an_epoch(world_size: int, cluster: None, tmp_path: Path) -> None:
    import ray.train
    import torch
    from ray.train.torch import TorchTrainer

    def loop(settings: dict[str, Any]) -> None:
        """What each worker of Ray Train does: two epochs, of which it keeps what it was given."""
        data = DataConfig.model_validate(settings["data"])
        plan = TrainingBatches.plan(Sequences.read(data.path), data, TrainingConfig(batch_sequences=16))
        context, shard = ray.train.get_context(), ray.train.get_dataset_shard("train")
        rank, world_size = context.get_world_rank(), context.get_world_size()
        feed = RayBatches(plan, all_gathered())
        epochs = []
        for epoch in range(2):
            batches = feed.iterate(shard, epoch, rank, world_size, torch.device("cpu"))
            epochs.append(
                [
                    (batch.window_B.tolist(), batch.items_M.tolist(), batch.num_sequences, batch.num_tokens)
                    for batch in batches
                ]
            )
        (Path(settings["out"]) / f"{rank}.json").write_text(json.dumps(epochs))

    path = tmp_path / "data"
    lists = histories(users=250)
    # Shards of unequal size: users with odd numbers have long histories.
    write_prepared(
        path, [items * (5 if user % 2 else 1) for user, items in enumerate(lists)], num_shards=2, row_group_size=32
    )
    data = DataConfig(path=str(path), max_len=8, windows="all")
    trainer = TorchTrainer(
        loop,
        train_loop_config={"data": data.model_dump(), "out": str(tmp_path)},
        scaling_config=ray.train.ScalingConfig(num_workers=world_size, resources_per_worker={"CPU": 1}),
        datasets={"train": ray_dataset(str(path), data)},
        dataset_config=every_row(),
        run_config=ray.train.RunConfig(name="feed", storage_path=str(tmp_path / "ray")),
    )
    trainer.fit()
    plan = TrainingBatches.plan(Sequences.read(str(path)), data, TrainingConfig(batch_sequences=16))
    expected = sorted(all_windows(plan).id_B.tolist())
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(world_size)]
    for epoch in range(2):
        parts = [rank[epoch] for rank in ranks]
        assert {len(part) for part in parts} == {plan.num_batches}
        assert sorted(window for part in parts for batch in part for window in batch[0]) == expected
        for of_ranks in zip(*parts, strict=True):
            assert {batch[2] for batch in of_ranks} == {sum(len(batch[0]) for batch in of_ranks)}
            assert {batch[3] for batch in of_ranks} == {sum(len(batch[1]) - len(batch[0]) for batch in of_ranks)}
