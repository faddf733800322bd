"""The input is the item's row and the mean of each feature's rows; scores are of item rows alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from feature_data import FEATURES, write_with_features
from tiny_data import histories, run_tree
from torch import Tensor

from genatt_dist import config as configuration
from genatt_dist.config import RunConfig, TrainingConfig
from genatt_dist.data.device import Read
from genatt_dist.data.histories import Histories, evaluation_batches
from genatt_dist.data.sequences import Sequences
from genatt_dist.embedding.features import FeatureTables, input_rows, mean_rows, replicated, with_features
from genatt_dist.embedding.table import initial_rows, table_seed
from genatt_dist.evaluation.evaluate import evaluate
from genatt_dist.training.engine import _optimizer
from genatt_dist.training.step import DenseModel

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    path = tmp_path_factory.mktemp("data") / "featured"
    write_with_features(path, histories())
    return configuration.parse(run_tree(path) | {"features": FEATURES}, "of a test")


def opened(config: RunConfig) -> Sequences:
    return Sequences.read(config.data.path, features=config.features)


def model_of(config: RunConfig, sequences: Sequences) -> DenseModel:
    torch.manual_seed(0)
    return DenseModel(config, sequences.num_items, sequences.features.num_rows).eval()


def by_hand(features: FeatureTables, histories: Histories) -> Tensor:
    """Σ_f mean of rows, position by position."""
    total = torch.zeros(len(histories.items_N), 16)
    for feature in features.of:
        weight, read = features.tables[f"{feature.name}_table"].weight, histories.features[feature.name]
        ends = [*read.first_N.tolist()[1:], len(read.row_K)]
        for position, (low, high) in enumerate(zip(read.first_N.tolist(), ends, strict=True)):
            if high > low:
                total[position] += weight[read.row_K[low:high]].mean(0)
    return total


def test_input_is_the_item_row_and_the_mean_rows_of_each_feature(config: RunConfig) -> None:
    sequences = opened(config)
    model = model_of(config, sequences)
    assert model.items is not None
    assert model.features is not None
    histories = next(evaluation_batches(sequences, "valid", 8, 20, 0, 1, CPU))
    with torch.no_grad():
        found = input_rows(with_features(model.items, model.features), histories)
        expected = model.items.weight[histories.items_N] + by_hand(model.features, histories)
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(found, model.items.weight[histories.items_N], atol=1e-3)


def test_a_position_that_has_no_values_adds_nothing_and_gives_no_gradient() -> None:
    rows = torch.randn(5, 3, requires_grad=True)
    found = mean_rows(rows, Read(torch.tensor([4, 2, 2]), torch.tensor([0, 0, 2, 3])))
    torch.testing.assert_close(found, torch.stack((found[0], (rows[4] + rows[2]) / 2, rows[2], found[3])))
    assert not found[[0, 3]].any()
    found.sum().backward()
    torch.testing.assert_close(rows.grad[:, 0], torch.tensor([0, 0, 1.5, 0, 0.5]))
    assert not mean_rows(rows, Read(torch.empty(0, dtype=torch.int64), torch.tensor([0, 0]))).any()


def test_weight_decay_leaves_feature_rows_alone(config: RunConfig) -> None:
    model = model_of(config, opened(config))
    assert model.features is not None
    groups = _optimizer(model, TrainingConfig(weight_decay=0.1)).param_groups
    spared = {id(parameter) for group in groups if not group["weight_decay"] for parameter in group["params"]}
    assert {id(parameter) for parameter in model.features.parameters()} <= spared
    assert any(group["weight_decay"] for group in groups)


def test_fresh_rows_are_keyed_by_table_and_row(config: RunConfig) -> None:
    sequences = opened(config)
    model = model_of(config, sequences)
    assert model.features is not None
    for feature in config.features:
        weight = model.features.tables[f"{feature.name}_table"].weight
        rows = sequences.features.num_rows[feature.name]
        assert torch.equal(weight, initial_rows(0, rows, 16, config.table.init_std, table_seed(0, feature.name)))
        assert not weight[0].any()
    tables = [table.weight for table in model.features.tables.values()]
    assert not torch.equal(tables[0][1:5], tables[1][1:5])


def test_without_features_the_model_is_the_one_before(config: RunConfig) -> None:
    plain = config.model_copy(update={"features": ()})
    sequences = opened(plain)
    model = model_of(plain, sequences)
    assert model.features is None
    assert model.items is not None
    assert with_features(model.items, None) is model.items
    assert not sequences.features.num_rows
    assert not [name for name, _ in model.named_parameters() if "features" in name]
    histories = next(evaluation_batches(sequences, "valid", 8, 20, 0, 1, CPU))
    assert histories.features == {}
    assert torch.equal(input_rows(model.items, histories), model.items.weight[histories.items_N])


def test_zero_rows_of_features_leave_the_ranking_alone_and_others_do_not(config: RunConfig) -> None:
    plain, sequences = config.model_copy(update={"features": ()}), opened(config)
    model = model_of(config, sequences)
    assert model.items is not None
    assert model.features is not None
    torch.nn.init.normal_(model.items.weight.data)
    table = with_features(model.items, model.features)

    def ranks(config: RunConfig, sequences: Sequences, zero: bool) -> np.ndarray:
        for tensor in model.features.parameters():
            tensor.data.normal_(generator=torch.Generator().manual_seed(1)) if not zero else tensor.data.zero_()
        here = table if config.features else model.items
        return evaluate(model.backbone, here, sequences, "valid", config, CPU).rank_U

    without = ranks(plain, opened(plain), zero=True)
    np.testing.assert_array_equal(ranks(config, sequences, zero=True), without)
    assert (ranks(config, sequences, zero=False) != without).any()


def test_the_one_process_model_has_all_rows_of_all_tables(config: RunConfig) -> None:
    tree = config.model_dump(mode="json") | {"table": {"kind": "sharded"}}
    tree["features"][0]["table"] = "sharded"
    sharded = configuration.parse(tree, "of a test")
    sequences = opened(sharded)
    apart, whole = (model_of(one, sequences) for one in (sharded, replicated(sharded)))
    names = {name for name, _ in whole.named_parameters()} - {name for name, _ in apart.named_parameters()}
    assert names == {"items.weight", "features.tables.genres_table.weight"}
