"""What one step of a variant is: the product's own code on made-up histories.

Training is the joint step (`training.step`) with keyed noise, one backward and the fused AdamW that `training.engine`
makes, without DeepSpeed around it: on one rank that adds the same to every variant. Without the softmax it is the
backbone's forward and backward with a fixed random gradient at the states. Serving is one lookup, the last state of
every history and the ranking of all items.

Legend: B sequences, N real tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.steps import lengths
from benchmarks.steps.grid import Variant
from data_pipeline.format import Manifest
from genatt_dist import config as configuration
from genatt_dist.config import RunConfig
from genatt_dist.data.batches import Batch, TrainingBatches
from genatt_dist.data.histories import Histories
from genatt_dist.data.sequences import Sequences
from genatt_dist.data.shuffle import POOL_BATCHES
from genatt_dist.embedding.table import ReplicatedTable
from genatt_dist.evaluation.evaluate import encode, query
from genatt_dist.loss.objective import Candidature
from genatt_dist.model.backbone import Backbone
from genatt_dist.model.context import Context, identity
from genatt_dist.training.step import DenseModel, JointStep, Losses, training_noise

NUM_ITEMS = 12_101  # amazon-beauty's
TOP = 10
_SEED = 0
_GAMMA = 1.0


@dataclass(frozen=True)
class Work:
    """run(input, draw): one step on one of its inputs; draw numbers the step, so that no two draw the same noise.
    inputs(batch): those of one pass, for that many sequences a batch.
    """

    run: Callable[[Any, int], object]
    inputs: Callable[[int], list[Any]]


def work(variant: Variant, device: torch.device, num_items: int = NUM_ITEMS) -> Work:
    """The variant's model on the device and what a step of it is."""
    config = configuration.parse(_tree(variant), f"of the benchmark's variant {variant.label}")
    torch.manual_seed(_SEED)
    if variant.mode == "serving":
        return _serving(variant, config, device, num_items)
    return (_training if variant.softmax else _backbone)(variant, config, device, num_items)


class _PlainEngine:
    """The dense model with the optimizer that `training.engine` gives DeepSpeed (no weight decay: one group)."""

    def __init__(self, model: DenseModel, config: RunConfig) -> None:
        self._model, training = model, config.training
        self._optimizer = torch.optim.AdamW(
            model.parameters(), training.learning_rate, betas=(0.9, training.beta2), weight_decay=0.0, fused=True
        )

    def __call__(self, *args: Any) -> Losses:
        losses: Losses = self._model(*args)
        return losses

    def backward(self, loss: Tensor) -> None:
        loss.backward()  # type: ignore[no-untyped-call]

    def step(self) -> None:
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)


def _training(variant: Variant, config: RunConfig, device: torch.device, num_items: int) -> Work:
    engine = _PlainEngine(DenseModel(config, num_items).to(device).train(), config)
    candidature = Candidature(config.loss, num_items, torch.ones(num_items + 1), device)
    step = JointStep(config, engine, candidature, table=None, world_size=1, total=identity)
    return Work(
        run=lambda batch, draw: step([batch], draw, _GAMMA),
        inputs=lambda size: _training_batches(variant, config, size, device, num_items),
    )


def _backbone(variant: Variant, config: RunConfig, device: torch.device, num_items: int) -> Work:
    backbone, width = Backbone(config.model, variant.max_len).to(device).train(), config.model.hidden_size

    def inputs(size: int) -> list[tuple[Batch, Tensor, Tensor]]:
        batches = _training_batches(variant, config, size, device, num_items)
        tokens = [(batch.num_tokens, width) for batch in batches]
        return [
            (batch, torch.randn(shape, device=device, requires_grad=True), torch.randn(shape, device=device))
            for batch, shape in zip(batches, tokens, strict=True)
        ]

    def run(given: tuple[Batch, Tensor, Tensor], draw: int) -> None:
        batch, rows_ND, gradient_ND = given
        noise = training_noise(batch, _SEED, draw, config)
        num_tokens = torch.tensor(float(batch.num_tokens), device=device)
        output = backbone(rows_ND, Context(batch.layout, noise, num_tokens=num_tokens))
        (torch.vdot(output.states_ND.flatten(), gradient_ND.flatten()) + _GAMMA * output.generative_loss).backward()
        rows_ND.grad = None
        backbone.zero_grad(set_to_none=True)

    return Work(run, inputs)


def _serving(variant: Variant, config: RunConfig, device: torch.device, num_items: int) -> Work:
    backbone = Backbone(config.model, variant.max_len).to(device).eval()
    table = ReplicatedTable(num_items, config.model.hidden_size, config.table.init_std, _SEED).to(device)

    @torch.no_grad()
    def run(histories: Histories, draw: int) -> None:
        states_BD = encode(backbone, table.lookup(histories.items_N), histories, config)
        if variant.softmax:
            table.rank(query(states_BD, histories, exclude_seen=True), TOP, config.evaluation.chunk_items)

    def inputs(size: int) -> list[Histories]:
        length, items = _histories(variant, size, num_items)
        end = np.cumsum(length + 1) - 1
        return [Histories.of(items, end - length, end, np.arange(size), variant.max_len, device)]

    return Work(run, inputs)


def _training_batches(
    variant: Variant, config: RunConfig, size: int, device: torch.device, num_items: int
) -> list[Batch]:
    """One batch where all histories are equally long. Under another law as the trainer makes them: windows of a pool
    sorted by length and cut at equal tokens; of those batches, one of each quarter by width.
    """
    pool = 1 if variant.lengths == "all_n" else POOL_BATCHES
    length, items = _histories(variant, pool * size, num_items)
    manifest = Manifest.model_construct(name="made up", num_items=num_items)  # type: ignore[call-arg]
    nobody = np.full(len(length), -1)
    sequences = Sequences.of(items, length + 1, (length + 1, nobody, nobody), manifest)
    training = config.training.model_copy(update={"batch_sequences": size})
    plan = TrainingBatches.plan(sequences, config.data, training)
    batches = sorted(plan.iterate(0, 0, 0, 1, device), key=lambda batch: batch.layout.width)
    return batches[pool // 8 :: max(1, pool // 4)]


def _histories(variant: Variant, count: int, num_items: int) -> tuple[np.ndarray, np.ndarray]:
    """Lengths of `count` histories, and their items one after the other, each with one more at its end (a target)."""
    random = np.random.Generator(np.random.Philox(key=_SEED))
    length = lengths.draw(variant.lengths, count, variant.max_len, random)
    return length, random.integers(1, num_items + 1, int(length.sum()) + count, dtype=np.int32)


def _tree(variant: Variant) -> dict[str, Any]:
    """The variant's configuration; what it does not name is the product's default."""
    attention: dict[str, Any] = {"type": variant.attention}
    if variant.form:
        attention["form"] = variant.form
    if variant.sampler == "ddim":
        assert variant.steps is not None
        # T = 50 is the paper's; a sampler of more steps needs a longer chain, whose length costs nothing by itself.
        attention |= {"diffusion_steps": max(50, variant.steps), "sampling_steps": variant.steps}
        attention |= {"sample_blocks": variant.sample_blocks}
    elif variant.steps is not None:
        attention |= {"diffusion_steps": variant.steps, "sampling_steps": min(4, variant.steps)}
        attention |= {"train_sampler": variant.sampler}
    return {
        "data": {"path": "made up", "max_len": variant.max_len},
        "model": {"hidden_size": 64, "num_blocks": variant.blocks, "attention": attention},
        "training": {"seed": _SEED},
    }
