"""One training step: TorchRec's rows, DeepSpeed's dense model and one loss joined so that neither sees the other's
parameters.

Order within a step, and why:
1. candidates are drawn (keyed: the same on every rank), so that histories, targets and negatives are looked up in one
   call;
2. a sharded table looks them up outside DeepSpeed; a replicated one inside the dense module, which owns it;
   the full softmax scores all rows besides: of a sharded table each rank its own, for the targets of all ranks;
3. the loss is Σ over the global batch's targets / their number; each rank adds its share, times the world size because
   both DeepSpeed and TorchRec average over ranks;
4. one backward: the fused table optimizer updates rows in it (so its rate is set before), DeepSpeed reduces dense
   gradients;
5. the dense optimizer steps, and under the full softmax the sharded table, whose rows had gradients from both sides.

Legend: B sequences, N positions, T trained ones, M window items, D width, K samples of the map.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from genatt_dist.attention.noise import NoiseKey, Purpose, derive
from genatt_dist.config import RunConfig, VariationalAttention
from genatt_dist.data.batches import Batch
from genatt_dist.embedding.features import FeatureTables, looked_up, sharded_ids
from genatt_dist.embedding.summed import Catalogue, SummedUpdate
from genatt_dist.embedding.table import ReplicatedTable
from genatt_dist.loss.full import default_chunk, full_loss, full_nll
from genatt_dist.loss.objective import Candidates, Candidature, candidate_nll, trained
from genatt_dist.model.backbone import Backbone
from genatt_dist.model.context import Context
from genatt_dist.model.jagged import Jagged
from genatt_dist.training.timing import SectionTimer

if TYPE_CHECKING:
    from genatt_dist.embedding.sharded import ShardedTable


class Losses(NamedTuple):
    """This rank's shares of the global batch's losses (they add up over ranks): scalars with gradient."""

    recommendation: Tensor
    generative: Tensor


@dataclass(frozen=True)
class Scale:
    """What turns sums into shares of one update: all its real tokens and targets, over ranks and accumulated
    batches.
    """

    num_tokens: int
    num_targets: int


class DenseModel(nn.Module):
    """Everything DeepSpeed owns: the backbone, the loss, and the rows of items and features that are replicated."""

    def __init__(self, config: RunConfig, num_items: int, feature_rows: Mapping[str, int] | None = None) -> None:
        """feature_rows: rows of each feature's table, by name, where the configuration has features."""
        super().__init__()
        self.config = config
        self.backbone = Backbone(config.model, config.data.max_len)
        self.items = (
            ReplicatedTable(num_items, config.model.hidden_size, config.table.init_std, config.training.seed)
            if config.table.kind == "replicated"
            else None
        )
        self.features = FeatureTables(config, feature_rows or {}) if config.features else None

    def forward(
        self,
        batch: Batch,
        candidates: Candidates,
        noise: NoiseKey,
        rows: Tensor | None,
        scale: Scale,
        total: Callable[[Tensor], Tensor],
        catalogue: Catalogue | None = None,
        feature_rows: Mapping[str, Tensor] | None = None,
    ) -> Losses:
        """Shares of both losses. rows: those of `candidates.ids` from a sharded table, or None to use the replicated
        one. catalogue: what the full softmax scores of a sharded table. feature_rows: those of `sharded_ids`, by name.
        """
        if rows is None:
            assert self.items is not None
            rows = self.items(candidates.ids)
        rows = rows.to(next(self.backbone.parameters()).dtype)
        samples = _train_samples(self.config)
        inputs_ND = rows[batch.input_index_N]
        if self.features is not None:
            inputs_ND = inputs_ND + self.features(batch.features, feature_rows or {}).to(rows.dtype)
        context = Context(
            layout=_repeated(batch.layout, samples),
            noise=noise,
            num_tokens=torch.full((), samples * batch.num_tokens, dtype=torch.float32, device=rows.device),
            total=total,
        )
        output = self.backbone(inputs_ND.repeat(samples, 1) if samples > 1 else inputs_ND, context)
        temperature = self.config.loss.temperature
        states_KTD = [trained(batch, states_ND) for states_ND in output.states_ND.chunk(samples)]
        states_KTD = states_KTD if temperature == 1 else [states_TD / temperature for states_TD in states_KTD]
        if self.config.loss.kind == "full":
            nll = self._full_nll_sum(states_KTD, trained(batch, batch.targets_N), catalogue)
        else:
            nll_KT = torch.stack([candidate_nll(states_TD, rows, batch, candidates) for states_TD in states_KTD])
            nll = -_log_mean_exp(-nll_KT).sum()
        return Losses(nll / scale.num_targets, output.generative_loss * (batch.num_tokens / scale.num_tokens))

    def _full_nll_sum(self, states_KTD: list[Tensor], targets_T: Tensor, catalogue: Catalogue | None) -> Tensor:
        """Σ over targets of the full softmax's negative log-likelihood, or of its K-sample bound."""
        if catalogue is None:
            assert self.items is not None
            catalogue = Catalogue(self.items.weight, None, len(self.items.weight))
        items_VD = catalogue.rows_VD
        chunk = self.config.loss.chunk_tokens or default_chunk(catalogue.most_rows, items_VD.device.type)
        where = (chunk, catalogue.padding, catalogue.first_row)
        ones_T = torch.ones(len(targets_T), device=targets_T.device)
        if len(states_KTD) == 1:
            return full_loss(states_KTD[0], items_VD, targets_T, ones_T, *where)
        # d/dθ of −log mean_k exp(−nll_k) is Σ_k softmax(−nll)_k · d nll_k/dθ: fixed weights turn it into the linear
        # loss that `full_loss` differentiates, and its value is put right afterwards.
        nll_KT = torch.stack([full_nll(states_TD, items_VD, targets_T, *where) for states_TD in states_KTD])
        share_KT, targets = torch.softmax(-nll_KT, 0), targets_T.repeat(len(states_KTD))
        linear = full_loss(torch.cat(states_KTD), items_VD, targets, share_KT.flatten(), *where)
        return linear + (-_log_mean_exp(-nll_KT).sum() - linear.detach())


class DenseEngine(Protocol):
    """What owns the dense model: DeepSpeed's adapter, or in a reference the module with a plain optimizer."""

    def __call__(self, *args: Any) -> Losses: ...

    def backward(self, loss: Tensor) -> None: ...

    def step(self) -> None:
        """Called after every backward; updates at the last of the accumulated ones."""


class JointStep:
    """Runs one update on this rank's parts of the accumulated global batches."""

    def __init__(
        self,
        config: RunConfig,
        engine: DenseEngine,
        candidature: Candidature,
        table: ShardedTable | None,
        world_size: int,
        total: Callable[[Tensor], Tensor],
        timer: SectionTimer | None = None,
    ) -> None:
        """table: the sharded one, or None where the dense model holds the rows. total: sums a tensor over ranks.
        timer: is told which section of the step the time goes to.
        """
        self._config, self._engine = config, engine
        self._candidature, self._table, self._world_size, self._total = candidature, table, world_size, total
        self._timer = timer or SectionTimer(torch.device("cpu"))
        self._summed = SummedUpdate(table, config.table) if table and config.loss.kind == "full" else None

    def __call__(self, batches: list[Batch], step: int, gamma: float) -> Losses:
        """Forward, backward and update; returns the update's loss shares, detached. gamma: weight of the generative
        loss.
        """
        scale = Scale(sum(batch.num_tokens for batch in batches), sum(batch.num_targets for batch in batches))
        shares = []
        for index, batch in enumerate(batches):
            losses = self._one(batch, step * len(batches) + index, gamma, scale)
            shares.append(torch.stack((losses.recommendation.detach(), losses.generative.detach())))
        if self._summed:
            with self._timer["optimizer"]:
                self._summed.update()
        return Losses(*torch.stack(shares).sum(0))

    def _one(self, batch: Batch, draw: int, gamma: float, scale: Scale) -> Losses:
        seed, timer = self._config.training.seed, self._timer
        with timer["forward"]:
            noise = training_noise(batch, seed, draw, self._config)
            candidates = self._candidature.draw(batch, noise, seed, draw)
        rows, others = None, None
        if self._table:
            with timer["lookup"]:
                self._table.observe(batch.items_M)
                lookup = self._summed or self._table
                rows, others = looked_up(lookup, candidates.ids, sharded_ids(self._config.features, batch.features))
        catalogue = self._summed.catalogue if self._summed else None
        with timer["forward"]:
            losses = self._engine(batch, candidates, noise, rows, scale, self._total, catalogue, others)
        with timer["backward"]:
            self._engine.backward((losses.recommendation + gamma * losses.generative) * self._world_size)
        with timer["optimizer"]:
            self._engine.step()
        return losses


def training_noise(batch: Batch, seed: int, draw: int, config: RunConfig) -> NoiseKey:
    """The batch's noise, once for each of K samples of the map."""
    layout, root = batch.layout, derive(seed, int(Purpose.TRAINING))
    keys = [
        NoiseKey.make(int(derive(root, sample)), draw, batch.window_B, layout.row_N, layout.position_N)
        for sample in range(_train_samples(config))
    ]
    return NoiseKey(torch.cat([key.token_N for key in keys]), torch.cat([key.sequence_B for key in keys]))


def _train_samples(config: RunConfig) -> int:
    """K of the bound −log 1/K Σ_k p(y | z_k); 1 but for V-GenAtt that asks for more."""
    generative = config.model.generative
    return generative.train_samples if isinstance(generative, VariationalAttention) else 1


def _repeated(layout: Jagged, times: int) -> Jagged:
    if times == 1:
        return layout
    rows = [layout.row_N + index * layout.size for index in range(times)]
    return Jagged(layout.lengths_B.repeat(times), layout.width, torch.cat(rows), layout.position_N.repeat(times))


def _log_mean_exp(x_KN: Tensor) -> Tensor:
    return x_KN.logsumexp(0) - math.log(len(x_KN))
