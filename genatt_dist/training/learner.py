"""What learns on one rank: the dense model on its engine, the item table, and the joint step that updates both."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, cast

import torch
import torch.distributed as dist

from genatt_dist.config import RunConfig
from genatt_dist.data.batches import Batch
from genatt_dist.data.sequences import Sequences
from genatt_dist.embedding.features import sharded_specs, with_features
from genatt_dist.embedding.table import ItemTable
from genatt_dist.loss.objective import Candidature
from genatt_dist.model.backbone import Backbone
from genatt_dist.training.engine import Engine, sum_over_ranks
from genatt_dist.training.performance import Performance
from genatt_dist.training.step import DenseModel, JointStep, Losses

if TYPE_CHECKING:
    from genatt_dist.embedding.sharded import ShardedTable


class Learner:
    """engine: holds the dense model, and a replicated table in it. sharded: the table, where it is sharded.
    performance: of the updates.
    """

    def __init__(self, config: RunConfig, sequences: Sequences, device: torch.device) -> None:
        """Fresh weights. Collective."""
        self._config, feature_rows, world_size = config, sequences.features.num_rows, dist.get_world_size()
        torch.manual_seed(config.training.seed)  # fresh dense weights; all later draws are keyed
        self.engine = Engine(DenseModel(config, sequences.num_items, feature_rows), config.training)
        self.dense = cast(DenseModel, self.engine.module)
        self.sharded: ShardedTable | None = None
        if config.table.kind == "sharded":
            from genatt_dist.embedding.sharded import ShardedTable

            self.sharded = ShardedTable(
                sequences.num_items,
                config.model.hidden_size,
                config.table,
                config.table_learning_rate,
                config.training.seed,
                device,
                sharded_specs(config, feature_rows),
            )
        dtype = torch.bfloat16 if config.training.precision == "bf16" else torch.float32
        self.performance = Performance(device, dtype, dist.get_rank(), world_size)
        self._step = JointStep(
            config,
            self.engine,
            Candidature(config.loss, sequences.num_items, torch.from_numpy(sequences.popularity[1:]), device),
            self.sharded,
            world_size,
            sum_over_ranks,
            self.performance.timer,
        )

    def set_training(self) -> None:
        """Dropout on, samples drawn as in training."""
        self.engine.train(True)

    def update(self, batches: list[Batch], step: int, rate: float, gamma: float) -> Losses:
        """Update number `step` (from 0) of table and dense parameters, at `rate` of their peak learning rates.

        gamma: weight of the generative loss. Collective.
        """
        if self.sharded:
            self.sharded.set_learning_rate(self._config.table_learning_rate * rate)
            self.sharded.set_updates(step)
        self.engine.set_learning_rate(self._config.training.learning_rate * rate)
        with self.performance.step(batches):
            return self._step(batches, step, gamma)

    @contextmanager
    def evaluating(self) -> Iterator[tuple[Backbone, ItemTable]]:
        """Inside, the backbone and the table that users are ranked with: dropout off, parameters whole on every rank.
        Collective.
        """
        self.engine.train(False)
        table = self.sharded or self.dense.items
        assert table is not None
        with self.engine.gathered():
            yield self.dense.backbone, with_features(table, self.dense.features)
