"""What the plan says of activations, parameters and operations, held against the model when it really runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from genatt_dist import config as configuration
from genatt_dist.config import RunConfig
from genatt_dist.data.batches import Batch
from genatt_dist.loss.objective import Candidature
from genatt_dist.model.context import identity
from genatt_dist.model.jagged import Jagged
from genatt_dist.plan.dense import dense, train_trace
from genatt_dist.plan.workload import Share, workload
from genatt_dist.training.step import DenseModel, Scale, training_noise

ITEMS, SHARE = 500, Share(sequences=24, length=20)


def _config(attention: dict[str, Any], **sections: Any) -> RunConfig:
    return configuration.parse(
        {"data": {"path": "unused", "max_len": SHARE.length}, "model": {"attention": attention}} | sections, "test"
    )


class _Saved:
    """Bytes of different storages that autograd keeps, without parameters."""

    def __init__(self, parameters: list[Tensor]) -> None:
        self._known = {parameter.untyped_storage().data_ptr() for parameter in parameters}
        self._kept: list[Tensor] = []
        self.bytes = 0

    def pack(self, tensor: Tensor) -> Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in self._known:
            self._known.add(place)
            self._kept.append(tensor)  # no other storage may come to lie there
            self.bytes += tensor.untyped_storage().nbytes()
        return tensor


def _saved_bytes(config: RunConfig) -> int:
    torch.manual_seed(0)
    model, tokens = DenseModel(config, ITEMS), SHARE.tokens
    layout = Jagged.of(torch.full((SHARE.sequences,), SHARE.length), SHARE.length, tokens)
    items = torch.randint(1, ITEMS + 1, (tokens + SHARE.sequences,))
    batch = Batch(items, layout, torch.arange(SHARE.sequences), None, tokens, tokens, SHARE.sequences)
    noise = training_noise(batch, 0, 0, config)
    candidates = Candidature(config.loss, ITEMS, torch.ones(ITEMS), torch.device("cpu")).draw(batch, noise, 0, 0)
    saved = _Saved(list(model.parameters()))
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda tensor: tensor):
        losses = model(batch, candidates, noise, None, Scale(tokens, tokens), identity)
        (losses.recommendation + losses.generative).backward()
    return saved.bytes


@pytest.mark.parametrize(
    "attention",
    [
        {"type": "dot_product"},
        {"type": "diffusion", "diffused_share": 1.0},
        pytest.param(
            {"type": "diffusion", "train_sampler": "unrolled", "diffusion_steps": 4, "diffused_share": 1.0},
            marks=pytest.mark.slow,
        ),
        {"type": "variational", "train_samples": 3},
        {"type": "variational", "form": "matrix"},
        {"type": "positional"},
        {"type": "gru"},
    ],
    ids=lambda attention: "-".join(str(value) for value in attention.values()),
)
def test_traced_activations_are_those_that_autograd_keeps(attention: dict[str, Any]) -> None:
    config = _config(attention, loss={"kind": "sampled", "num_negatives": 64})
    traced = train_trace(config, ITEMS, ITEMS + 1, SHARE, "cpu").saved_bytes
    assert traced == pytest.approx(_saved_bytes(config), rel=0.15)


def test_parameters_are_counted_exactly() -> None:
    for attention in ("dot_product", "diffusion", "variational", "hybrid"):
        config = _config({"type": attention})
        model = DenseModel(config, ITEMS)
        assert dense(config, ITEMS).total == sum(parameter.numel() for parameter in model.parameters())


def test_tables_of_features_are_parameters_too() -> None:
    columns = [{"type": "context", "column": "gap"}, {"type": "attribute", "column": "brand", "buckets": 30}]
    config = _config({"type": "dot_product"}, features=columns)
    load = workload(config, ITEMS, None)
    model = DenseModel(config, ITEMS, load.feature_rows)
    sizes = dense(config, ITEMS, load.feature_rows)
    assert sizes.total == sum(parameter.numel() for parameter in model.parameters())
    trace = train_trace(config, ITEMS, ITEMS + 1, SHARE, "cpu", features=load.features)
    without = train_trace(_config({"type": "dot_product"}), ITEMS, ITEMS + 1, SHARE, "cpu")
    assert trace.peak_bytes >= without.peak_bytes + 4 * 64 * load.feature_rows["gap"]


def test_what_is_not_trained_and_rows_of_low_precision_are_seen() -> None:
    def peak(**sections: Any) -> int:
        return train_trace(_config({"type": "dot_product"}, **sections), ITEMS, 50_000, SHARE, "cpu").peak_bytes

    full = {"kind": "full", "chunk_tokens": 480}
    last = {"path": "unused", "max_len": SHARE.length, "targets": "last"}
    assert peak(loss=full) - peak(loss=full, data=last) > 0.75 * 4 * 50_000 * (SHARE.tokens - SHARE.sequences)
    half = peak(loss=full, table={"kind": "sharded", "precision": "fp16"})
    assert half - peak(loss=full, table={"kind": "sharded"}) == pytest.approx(4 * 64 * 50_000, rel=0.05)


def test_a_traced_chunked_softmax_is_worth_three_products_over_all_rows() -> None:
    few, many = (_config({"type": "dot_product"}, loss={"chunk_tokens": chunk}) for chunk in (SHARE.tokens, 16))
    whole, parts = (train_trace(config, ITEMS, ITEMS + 1, SHARE, "cpu").flops for config in (few, many))
    assert parts == pytest.approx(whole, rel=0.01)
    model = train_trace(_config({"type": "dot_product"}, loss={"kind": "bce"}), ITEMS, ITEMS + 1, SHARE, "cpu").flops
    assert whole - model == pytest.approx(3 * 2 * SHARE.tokens * ITEMS * 64, rel=0.01)


def test_diffusing_fewer_sequences_takes_less_on_a_cpu_and_as_much_on_a_gpu() -> None:
    half, all_of_them = (
        _config({"type": "diffusion", "diffused_share": share}, loss={"kind": "bce"}) for share in (0.5, 1.0)
    )
    cpu = [train_trace(config, ITEMS, 1, SHARE, "cpu").saved_bytes for config in (half, all_of_them)]
    gpu = [train_trace(config, ITEMS, 1, SHARE, "cuda").saved_bytes for config in (half, all_of_them)]
    assert cpu[0] < 0.95 * cpu[1]
    assert gpu[0] == gpu[1]
