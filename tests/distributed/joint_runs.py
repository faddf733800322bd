"""The same updates twice: by the product on this process's rank, and by plain PyTorch in one process.

The reference knows no DeepSpeed and no TorchRec. It shares the model's forward pass, the batches and the keyed draws;
what the product is about is done by hand: one loss over the whole global batch, one backward, the sum of all gradients
of a row, and the two optimizers.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from ranks import partition_every_parameter
from torch import Tensor

from genatt_dist.config import RunConfig
from genatt_dist.data.batches import Batch, TrainingBatches
from genatt_dist.data.sequences import Sequences
from genatt_dist.embedding.sharded import ShardedTable
from genatt_dist.embedding.summed import Catalogue
from genatt_dist.embedding.table import initial_rows
from genatt_dist.loss.objective import Candidature
from genatt_dist.model.context import identity
from genatt_dist.training.engine import Engine, sum_over_ranks
from genatt_dist.training.step import DenseModel, JointStep, Scale, training_noise

STEPS = 5
CPU = torch.device("cpu")
_EPS = 1e-8  # of row-wise Adagrad


@dataclass(frozen=True)
class Outcome:
    """What the updates left: losses (of the recommendation and of generation) [STEPS, 2], dense parameters and buffers
    by name, all rows of the table, and the state of a sharded table's optimizer (no rows where it has none).
    """

    losses: npt.NDArray[np.float32]
    dense: dict[str, npt.NDArray[np.float32]]
    table: npt.NDArray[np.float32]
    state: npt.NDArray[np.float32]

    def difference(self, other: Outcome) -> tuple[float, float, float]:
        """Largest differences: of losses (as a share of those above 1), dense tensors, table rows and their state."""
        assert self.dense.keys() == other.dense.keys()
        losses = np.abs(self.losses - other.losses) / np.maximum(1, np.abs(other.losses))
        dense = max(float(np.abs(self.dense[name] - other.dense[name]).max()) for name in self.dense)
        state = float(np.abs(self.state - other.state).max(initial=0))
        return float(losses.max()), dense, max(float(np.abs(self.table - other.table).max()), state)


def by_product(config: RunConfig) -> Outcome:
    """This rank's part of the updates, with DeepSpeed and (for a sharded table) TorchRec. Collective."""
    partition_every_parameter()
    sequences = Sequences.read(config.data.path)
    torch.manual_seed(config.training.seed)
    engine = Engine(DenseModel(config, sequences.num_items), config.training)
    whole = sum(parameter.numel() for parameter in engine.module.parameters())
    assert (whole == 0) == (config.training.zero_stage == 3), "only ZeRO-3 takes parameters apart, and then all of them"
    table = sharded_table(config, sequences.num_items) if config.table.kind == "sharded" else None
    step = JointStep(
        config,
        engine,
        _candidature(config, sequences),
        table,
        dist.get_world_size(),
        sum_over_ranks,
    )
    engine.train(True)
    losses = []
    for number, batches in enumerate(_updates(config, sequences, dist.get_rank(), dist.get_world_size())):
        engine.set_learning_rate(config.training.learning_rate * _rate(number))
        if table:
            table.set_learning_rate(config.table_learning_rate * _rate(number))
        losses.append(sum_over_ranks(torch.stack(step(batches, number, _gamma(number)))))
    dense = {
        name.split(".", 1)[1]: value
        for name, value in engine.state().items()
        if name.startswith(("parameter", "buffer"))
    }
    rows = gather_rows(table) if table else dense.pop("items.weight")
    return _outcome(losses, dense, rows, _gather_state(table) if table else None)


def by_plain_pytorch(config: RunConfig) -> Outcome:
    """The same updates in one process on whole global batches."""
    sequences = Sequences.read(config.data.path)
    torch.manual_seed(config.training.seed)
    dense = DenseModel(config, sequences.num_items)
    optimizer = _dense_optimizer(dense, config)
    table = None
    if config.table.kind == "sharded":
        table = _PlainTable(config, sequences.num_items)
    candidature = _candidature(config, sequences)
    losses = []
    for number, batches in enumerate(_updates(config, sequences, rank=0, world_size=1)):
        rate = _rate(number)
        scale = Scale(sum(batch.num_tokens for batch in batches), sum(batch.num_targets for batch in batches))
        shares = []
        for index, batch in enumerate(batches):
            draw = number * len(batches) + index
            noise = training_noise(batch, config.training.seed, draw, config)
            candidates = candidature.draw(batch, noise, config.training.seed, draw)
            rows = table.rows[candidates.ids] if table else None
            catalogue = Catalogue(table.rows, None, len(table.rows)) if table else None
            shares.append(torch.stack(dense(batch, candidates, noise, rows, scale, identity, catalogue)))
        recommendation, generative = torch.stack(shares).sum(0)
        (recommendation + _gamma(number) * generative).backward()
        for group in optimizer.param_groups:
            group["lr"] = config.training.learning_rate * rate
        optimizer.step()
        optimizer.zero_grad()
        if table:
            table.update(config.table_learning_rate * rate)
        losses.append(torch.stack((recommendation, generative)).detach())
    tensors = dict(itertools.chain(dense.named_parameters(), dense.named_buffers()))
    if table:
        return _outcome(losses, tensors, table.rows, table.state)
    return _outcome(losses, tensors, tensors.pop("items.weight"), None)


def sharded_table(config: RunConfig, num_items: int) -> ShardedTable:
    """The table as the trainer makes it."""
    return ShardedTable(
        num_items, config.model.hidden_size, config.table, config.table_learning_rate, config.training.seed, CPU
    )


def gather_rows(table: ShardedTable) -> Tensor:
    """All rows [V + 1, D], whatever rank holds them. Collective."""
    parts: list[Tensor] = [torch.empty(0)] * dist.get_world_size()
    dist.all_gather_object(parts, table.rows_VD.clone())
    return torch.cat(parts)


def _gather_state(table: ShardedTable) -> Tensor | None:
    """The optimizer's state of all rows, whatever rank holds them. Collective."""
    parts: list[Tensor | None] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, next((state.clone() for state in table.optimizer_state.values()), None))
    return torch.cat([part for part in parts if part is not None]) if any(p is not None for p in parts) else None


class _PlainTable:
    """Rows as one parameter, updated by SGD, by Adagrad, whose state sums squared gradients, or by row-wise Adagrad,
    whose state sums a row's mean of them.
    """

    def __init__(self, config: RunConfig, num_items: int) -> None:
        rows = initial_rows(0, num_items + 1, config.model.hidden_size, config.table.init_std, config.training.seed)
        self.rows = torch.nn.Parameter(rows)
        shapes = {"adagrad": rows.shape, "rowwise_adagrad": rows.shape[:1]}
        shape = shapes.get(config.table.optimizer)
        self.state = None if shape is None else torch.zeros(shape)

    @torch.no_grad()
    def update(self, rate: float) -> None:
        gradient_VD = self.rows.grad
        assert gradient_VD is not None
        if self.state is None:
            self.rows -= rate * gradient_VD
        else:
            square_VD = gradient_VD.square()
            self.state += square_VD if self.state.ndim == 2 else square_VD.mean(1)
            self.rows -= rate * gradient_VD / (self.state.view(len(self.state), -1).sqrt() + _EPS)
        self.rows.grad = None


def _dense_optimizer(dense: DenseModel, config: RunConfig) -> torch.optim.Optimizer:
    training = config.training
    if training.optimizer == "sgd":
        return torch.optim.SGD(dense.parameters(), lr=training.learning_rate)
    matrices = {
        name
        for name, p in dense.named_parameters()
        if p.ndim > 1 and not name.endswith(("items.weight", "position.weight", ".bias"))
    }
    groups = [
        {"params": [p for name, p in dense.named_parameters() if (name in matrices) == decayed], "weight_decay": decay}
        for decayed, decay in ((True, training.weight_decay), (False, 0.0))
    ]
    return torch.optim.AdamW(groups, lr=training.learning_rate, betas=(0.9, training.beta2), eps=1e-8)


def _updates(config: RunConfig, sequences: Sequences, rank: int, world_size: int) -> Iterator[list[Batch]]:
    """STEPS updates' parts of one rank, from as many epochs as that takes."""
    plan = TrainingBatches.plan(sequences, config.data, config.training)
    parts = itertools.chain.from_iterable(plan.iterate(epoch, 0, rank, world_size, CPU) for epoch in itertools.count())
    for _ in range(STEPS):
        yield list(itertools.islice(parts, config.training.accumulation_steps))


def _candidature(config: RunConfig, sequences: Sequences) -> Candidature:
    return Candidature(config.loss, sequences.num_items, torch.from_numpy(sequences.popularity[1:]), CPU)


# Both change from update to update: one that came late, or that a fused optimizer did not get, would show.
_rate: Callable[[int], float] = (1.0, 0.7, 0.9, 0.4, 0.8).__getitem__
_gamma: Callable[[int], float] = (0.0, 0.3, 0.6, 1.0, 0.8).__getitem__


def _outcome(losses: list[Tensor], dense: dict[str, Tensor], rows: Tensor, state: Tensor | None) -> Outcome:
    arrays = {name: value.detach().numpy() for name, value in dense.items()}
    state = torch.empty(0) if state is None else state
    return Outcome(torch.stack(losses).numpy(), arrays, rows.detach().numpy(), state.numpy())
