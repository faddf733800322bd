"""Rows that Ray makes carry times where context needs them, and read the same feature rows as the loader's."""

from __future__ import annotations

import pyarrow as pa
import pytest
import torch
from feature_data import FEATURES, write_with_features
from tiny_data import histories, run_tree

from data_pipeline.errors import GenattError
from genatt_dist import config as configuration
from genatt_dist.config import RunConfig
from genatt_dist.data.batches import Batch, TrainingBatches
from genatt_dist.data.ray_dataset import _Cut
from genatt_dist.data.ray_feed import RayBatches
from genatt_dist.data.sequences import Sequences

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    path = tmp_path_factory.mktemp("data") / "timed"
    write_with_features(path, histories(), num_shards=2, row_group_size=8)
    return configuration.parse(run_tree(path) | {"features": FEATURES}, "of a test")


def rows_of(config: RunConfig, plan: TrainingBatches, timed: bool) -> pa.Table:
    """The rows of all row groups, as a process of Ray's makes them."""
    cut, work, first_user = _Cut(config.data.path, config.data, timed), [], 0
    manifest = plan.sequences.manifest
    for shard, file in enumerate(manifest.files):
        for number, low in enumerate(range(0, file.users, manifest.row_group_size)):
            work.append({"shard": shard, "row_group": number, "first_user": first_user + low})
        first_user += file.users
    return cut(pa.Table.from_pylist(work))


def plan_of(config: RunConfig) -> TrainingBatches:
    sequences = Sequences.read(config.data.path, features=config.features)
    return TrainingBatches.plan(sequences, config.data, config.training)


def by_window(batches: list[Batch]) -> dict[int, list[list[list[int]]]]:
    """window → at each of its positions, each feature's rows."""
    found: dict[int, list[list[list[int]]]] = {}
    for batch in batches:
        bags = [read.row_K.tensor_split(read.first_N[1:]) for read in batch.features.values()]
        for row, *at_position in zip(batch.layout.row_N.tolist(), *bags, strict=True):
            found.setdefault(int(batch.window_B[row]), []).append([rows.tolist() for rows in at_position])
    return found


def test_windows_of_ray_read_the_rows_that_the_loader_reads(config: RunConfig) -> None:
    plan = plan_of(config)
    parts = RayBatches(plan, lambda value: [value]).parts(iter([rows_of(config, plan, timed=True)]), 0, 0, 1)
    by_ray, by_loader = (list(batches) for batches in ((part.on(CPU) for part in parts), plan.iterate(0, 0, 0, 1, CPU)))
    assert by_ray[0].features.keys() == {feature.name for feature in config.features}
    assert by_window(by_ray) == by_window(by_loader)


def test_rows_without_times_are_refused_when_context_needs_them(config: RunConfig) -> None:
    plan = plan_of(config)
    feed = RayBatches(plan, lambda value: [value])
    with pytest.raises(GenattError, match=r"rows of Ray without times.*ray_dataset\(path, data, timed=True\)"):
        list(feed.parts(iter([rows_of(config, plan, timed=False)]), 0, 0, 1))
