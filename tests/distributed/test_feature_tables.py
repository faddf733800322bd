"""Feature tables, sharded beside the items' or replicated, train as plain PyTorch would, and travel with a run."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import ranks
import torch
import torch.distributed as dist
from feature_data import CONTEXT, write_with_features
from test_resume import train, write_config
from torch import Tensor

from genatt_dist import config as configuration
from genatt_dist.config import RunConfig
from genatt_dist.data.batches import TrainingBatches
from genatt_dist.data.sequences import Sequences
from genatt_dist.embedding.features import replicated, sharded_specs
from genatt_dist.embedding.sharded import ShardedTable
from genatt_dist.embedding.table import ITEM_TABLE
from genatt_dist.loss.objective import Candidature
from genatt_dist.model.context import identity
from genatt_dist.training.engine import Engine, sum_over_ranks
from genatt_dist.training.step import DenseModel, JointStep, Scale, training_noise

pytestmark = pytest.mark.distributed

CPU = torch.device("cpu")
STEPS = 4
TOLERANCE = 1e-6
Arrays = dict[str, npt.NDArray[np.float32]]


@pytest.fixture(scope="module")
def featured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """240 users who walk over 60 items, with times and attributes."""
    path, random = tmp_path_factory.mktemp("data") / "featured", np.random.default_rng(0)
    lists = [((user + np.arange(random.integers(3, 16))) % 60 + 1).tolist() for user in range(240)]
    write_with_features(path, lists)
    return path


def config_of(path: Path, genres: str = "sharded", year: str = "sharded", **sections: dict[str, Any]) -> RunConfig:
    tree: dict[str, Any] = {
        "data": {"path": str(path), "max_len": 10, "windows": "all"},
        "model": {"hidden_size": 16, "num_heads": 2, "num_blocks": 1, "dropout": 0.2},
        "table": {"kind": "sharded", "optimizer": "sgd", "init_std": 0.1},
        "features": [
            {"type": "attribute", "column": "genres", "table": genres},
            {"type": "attribute", "column": "year", "buckets": 40, "table": year},
            {"type": "attribute", "column": "genres", "name": "type", "max_values": 1},
            *CONTEXT,
        ],
        "loss": {"kind": "sampled", "num_negatives": 16},
        "training": {"batch_sequences": 24, "learning_rate": 0.1, "optimizer": "sgd", "zero_stage": 1},
        "evaluation": {"batch_users": 64},
        "world_size": 2,
    }
    for name, values in sections.items():
        tree[name] = tree[name] | values
    return configuration.parse(tree, "of a test")


def by_product(config: RunConfig) -> tuple[list[float], Arrays]:
    """Losses and all parameters by name, rows of sharded tables among them. Collective."""
    ranks.partition_every_parameter()
    sequences = Sequences.read(config.data.path, features=config.features)
    rows = sequences.features.num_rows
    torch.manual_seed(config.training.seed)
    engine = Engine(DenseModel(config, sequences.num_items, rows), config.training)
    table = None
    if config.table.kind == "sharded":
        width, rate, seed = config.model.hidden_size, config.table_learning_rate, config.training.seed
        table = ShardedTable(sequences.num_items, width, config.table, rate, seed, CPU, sharded_specs(config, rows))
    step = JointStep(config, engine, candidature(config, sequences), table, dist.get_world_size(), sum_over_ranks)
    engine.train(True)
    batches = TrainingBatches.plan(sequences, config.data, config.training).iterate(
        0, 0, dist.get_rank(), dist.get_world_size(), CPU
    )
    losses = [
        float(sum_over_ranks(step([batch], number, 0.0).recommendation))
        for number, batch in enumerate(itertools.islice(batches, STEPS))
    ]
    found = {name.removeprefix("parameter."): value.numpy() for name, value in engine.state().items()}
    return losses, found | (gathered(table) if table else {})


def gathered(table: ShardedTable) -> Arrays:
    """All rows of all sharded tables, named as they are in a model that holds them. Collective."""
    here = [(shard.name, shard.first_row, shard.rows.numpy().copy()) for shard in table.shards]
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, here)
    whole: dict[str, list[Any]] = {}
    for name, first_row, rows in itertools.chain.from_iterable(parts):
        whole.setdefault(name, []).append((first_row, rows))
    return {
        "items.weight" if name == ITEM_TABLE else f"features.tables.{name}_table.weight": np.concatenate(
            [rows for _, rows in sorted(shards, key=lambda shard: shard[0])]
        )
        for name, shards in whole.items()
    }


def by_plain_pytorch(config: RunConfig) -> tuple[list[float], Arrays]:
    """The same updates by one optimizer over all rows and weights, in one process on whole batches."""
    sequences = Sequences.read(config.data.path, features=config.features)
    torch.manual_seed(config.training.seed)
    model = DenseModel(replicated(config), sequences.num_items, sequences.features.num_rows)
    optimizer = torch.optim.SGD(model.parameters(), lr=config.training.learning_rate)
    candidates_of, losses = candidature(config, sequences), []
    batches = TrainingBatches.plan(sequences, config.data, config.training).iterate(0, 0, 0, 1, CPU)
    for number, batch in enumerate(itertools.islice(batches, STEPS)):
        noise = training_noise(batch, config.training.seed, number, config)
        candidates = candidates_of.draw(batch, noise, config.training.seed, number)
        loss: Tensor = model(
            batch, candidates, noise, None, Scale(batch.num_tokens, batch.num_targets), identity
        ).recommendation
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses, {name: value.detach().numpy() for name, value in model.named_parameters()}


def candidature(config: RunConfig, sequences: Sequences) -> Candidature:
    return Candidature(config.loss, sequences.num_items, torch.from_numpy(sequences.popularity[1:]), CPU)


@pytest.mark.parametrize(
    ("world_size", "tables", "sections"),
    [
        (3, {}, {}),
        (2, {"genres": "replicated"}, {"training": {"zero_stage": 3}}),
        (2, {}, {"loss": {"kind": "full"}}),
        (
            2,
            {"genres": "replicated", "year": "replicated"},
            {"table": {"kind": "replicated"}, "loss": {"kind": "full"}, "training": {"zero_stage": 3}},
        ),
        (2, {"genres": "replicated", "year": "replicated"}, {"loss": {"kind": "bce"}, "training": {"zero_stage": 0}}),
    ],
    ids=["sharded on 3", "some sharded, ZeRO-3", "sharded, full softmax", "replicated, ZeRO-3", "items sharded"],
)
def test_ranks_follow_plain_pytorch_on_one(
    featured: Path, world_size: int, tables: dict[str, str], sections: dict[str, Any]
) -> None:
    config = config_of(featured, **tables, **sections)
    losses, expected = by_plain_pytorch(config)
    for found_losses, found in ranks.run_in_group(by_product, world_size, config):
        np.testing.assert_allclose(found_losses, losses, atol=TOLERANCE, rtol=TOLERANCE)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_allclose(found[name], value, atol=TOLERANCE, err_msg=name)
    fresh = by_plain_pytorch_untrained(config)
    assert all((expected[name] != value).any() for name, value in fresh.items()), "every table is trained"


def by_plain_pytorch_untrained(config: RunConfig) -> Arrays:
    sequences = Sequences.read(config.data.path, features=config.features)
    model = DenseModel(replicated(config), sequences.num_items, sequences.features.num_rows)
    return {name: value.detach().numpy() for name, value in model.features.named_parameters(prefix="features")}


def records(run: Path, kind: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


@pytest.fixture(scope="module")
def whole_and_stopped(featured: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run of four epochs with features of every kind, and the same stopped in its third."""
    folder = tmp_path_factory.mktemp("runs")
    training = {"optimizer": "adamw", "learning_rate": 0.005, "epochs": 4, "patience": 9, "weight_decay": 0.01}
    config = config_of(featured, year="replicated", training=training, table={"optimizer": "rowwise_adagrad"})
    whole, stopped = write_config(folder / "whole", config), write_config(folder / "stopped", config)
    ranks.run(train, 2, whole)
    ranks.run(train, 2, stopped, False, True)
    return whole, stopped


def test_resumed_on_one_rank_the_run_goes_on_as_if_never_stopped(whole_and_stopped: tuple[Path, Path]) -> None:
    whole, stopped = whole_and_stopped
    ranks.run(train, 1, stopped, True)
    expected = {record["step"]: record["loss"] for record in records(whole, "train")}
    found = {record["step"]: record["loss"] for record in records(stopped, "train")}
    assert found.keys() == expected.keys()
    for step, loss in expected.items():
        assert found[step] == pytest.approx(loss, abs=1e-5)
    for there, here in zip(records(whole, "valid"), records(stopped, "valid"), strict=True):
        assert here["ndcg@10"] == pytest.approx(there["ndcg@10"], abs=1e-5)


def evaluated(run: Path) -> tuple[float, list[float]]:
    """In one process: validation NDCG@10 at the best step, and scores that recommend gives a known user, the same
    history as a file of requests with times, and without.
    """
    import polars as pl

    from genatt_dist.evaluation.run import evaluate_run
    from genatt_dist.serving.recommend import read_requests, recommend
    from genatt_dist.serving.trained import load

    report = evaluate_run(run, "valid")
    trained = load(run)
    sequences = trained.sequences
    user = int(np.argmax(sequences.lengths))
    events, _ = sequences.take(sequences.offsets[[user]], sequences.lengths[[user]])
    words = pl.read_parquet(Path(sequences.path) / "vocabulary/items.parquet").sort("dense_id")["item_id"]
    raw = pl.DataFrame({"user_id": [7] * len(events), "item_id": words.gather(events["item"] - 1)})
    tables = [
        pl.DataFrame({"user_id": [sequences.user_ids[user].as_py()]}),
        raw.with_columns(timestamp=pl.Series(events["seconds"])),
        raw,
    ]
    scores = []
    for number, table in enumerate(tables):
        table.write_parquet(run / f"requests-{number}.parquet")
        requests = read_requests(run / f"requests-{number}.parquet", trained)
        scores.append(float(recommend(trained, requests, 5)["score"][0]))
    return report["metrics"]["ndcg@10"], scores


def test_one_process_evaluates_and_recommends_as_the_ranks_that_trained(whole_and_stopped: tuple[Path, Path]) -> None:
    whole, _ = whole_and_stopped
    ((metric, (known, with_times, without)),) = ranks.run(evaluated, 1, whole)
    assert metric == pytest.approx(max(record["ndcg@10"] for record in records(whole, "valid")), abs=1e-6)
    assert with_times == pytest.approx(known, abs=1e-6)
    assert without != pytest.approx(known, abs=1e-6), "context is unknown without times"
