"""The dense side of a rank, run with shapes alone: its parameters, and what a training step allocates and computes.

The backbone and the losses are the product's own, on meta tensors (`trace`). A full softmax of many chunks is run for a
few of them and its work multiplied: chunks are alike, and the peak is that of one.

Legend: B sequences, N real tokens, V rows scored here, D width, K samples of the map.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from genatt_dist.attention.noise import NoiseKey
from genatt_dist.config import DiffusionAttention, RunConfig, VariationalAttention
from genatt_dist.data.batches import Batch
from genatt_dist.data.device import Read
from genatt_dist.embedding.features import mean_rows
from genatt_dist.loss import objective, sampled
from genatt_dist.loss.full import default_chunk, full_loss, full_nll
from genatt_dist.loss.objective import Candidates, candidate_nll, trained
from genatt_dist.model.backbone import Backbone
from genatt_dist.model.context import Context
from genatt_dist.model.jagged import Jagged
from genatt_dist.plan.trace import Trace, Tracer, recurrence
from genatt_dist.plan.workload import FeatureSize, Share

_CHUNKS = 8  # of a full softmax that are traced
_META = torch.device("meta")
_MATH, _FLASH, _EFFICIENT = 0, 1, 2  # torch.nn.attention.SDPBackend
_ROWS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Dense:
    """parameters: of the backbone and replicated feature tables. item_parameters: of a replicated item table, else 0.
    largest: numbers in the largest tensor. tensors: how many there are.
    """

    parameters: int
    item_parameters: int
    largest: int
    tensors: int

    @property
    def total(self) -> int:
        return self.parameters + self.item_parameters


def dense(config: RunConfig, num_items: int, feature_rows: Mapping[str, int] | None = None) -> Dense:
    """Sizes of what DeepSpeed owns. feature_rows: by name, where the configuration has features."""
    sizes = [parameter.numel() for parameter in _backbone(config).parameters()]
    sizes += [(feature_rows or {})[one.name] * config.model.hidden_size for one in config.features if not one.sharded]
    rows = (num_items + 1) * config.model.hidden_size if config.table.kind == "replicated" else 0
    return Dense(sum(sizes), rows, max([*sizes, rows]), len(sizes) + bool(rows))


def chunk_tokens(config: RunConfig, rows: int, device: str) -> int:
    """Targets of one chunk of the full softmax over `rows` rows, as the step chooses it."""
    return config.loss.chunk_tokens or default_chunk(rows, device)


def targets(config: RunConfig, share: Share) -> int:
    """Positions that are trained."""
    return share.sequences if config.data.targets == "last" else share.tokens


def lookup_ids(config: RunConfig, num_items: int, share: Share, gathered: int = 1) -> int:
    """Ids of one lookup: the windows' items (one more than positions), and the negatives. gathered: ranks
    whose targets are negatives of all.
    """
    items, loss = share.tokens + share.sequences, config.loss
    if loss.kind == "full":
        return items
    if loss.kind == "sampled" and loss.proposal == "in_batch":
        return items + gathered * targets(config, share)
    if loss.shares_negatives:
        return items + loss.num_negatives
    draws = targets(config, share) * _own_negatives(config)  # uniform, and each id once: V(1 − (1 − 1/V)^draws) of them
    return items + round(num_items * -math.expm1(-draws / num_items))


def feature_ids(config: RunConfig, share: Share, features: Mapping[str, FeatureSize]) -> int:
    """Ids that are looked up in the sharded tables of features."""
    return sum(round(share.tokens * features[one.name].values) for one in config.features if one.sharded)


def train_trace(
    config: RunConfig,
    num_items: int,
    rows: int,
    share: Share,
    device: str,
    gathered: int = 1,
    features: Mapping[str, FeatureSize] | None = None,
) -> Trace:
    """A forward and a backward pass of one micro-batch.

    rows: of the table on this rank (the full softmax scores them). gathered: ranks whose targets this rank scores
    (vocabulary parallel) or scores against (in-batch negatives), 1 otherwise. features: by name, where the
    configuration has any. A table's gradient is in the trace's bytes, the table is not.
    """
    if device == "cuda":
        config = _all_diffused(config)
    dtype = torch.bfloat16 if config.training.precision == "bf16" else torch.float32
    backbone, d = _backbone(config).to(dtype), config.model.hidden_size
    own = dtype if config.table.kind == "replicated" else _ROWS[config.table.precision]
    table = torch.empty(rows, d, dtype=own, device=_META, requires_grad=True)
    if config.table.kind == "sharded":
        table.grad_dtype = torch.float32  # as `SummedUpdate` has it
    others = {
        one.name: torch.empty(
            round(share.tokens * features[one.name].values) if one.sharded else features[one.name].rows,
            *(d,),
            dtype=torch.float32 if one.sharded else dtype,
            device=_META,
            requires_grad=True,
        )
        for one in config.features
        if features
    }
    samples, n_tokens = _samples(config), share.tokens
    attention = config.model.attention
    generator = getattr(attention, "generator", attention)
    picked = generator.share if isinstance(generator, DiffusionAttention) else 1.0
    tracer = Tracer([share.length] * (share.sequences * samples), picked, _kernels(device))
    tracer.ignore(iter([*backbone.parameters(), *backbone.buffers(), table, *others.values()]))
    with _budgets(device), tracer, recurrence(tracer, backbone.encoder):
        ids = _ids(lookup_ids(config, num_items, share, gathered))
        if config.table.kind == "replicated":
            looked = nn.functional.embedding(ids, table)
        else:
            looked = torch.empty(len(ids), d, device=_META).to(dtype).requires_grad_()
        inputs_ND = looked[_ids(n_tokens)]
        for name, feature_VD in others.items():
            read = Read(_ids(round(n_tokens * (features or {})[name].values)), _ids(n_tokens))
            inputs_ND = inputs_ND + mean_rows(feature_VD, read).to(dtype)
        inputs_ND = inputs_ND.repeat(samples, 1) if samples > 1 else inputs_ND
        layout = Jagged(
            _ids(share.sequences * samples), share.length, _ids(n_tokens * samples), _ids(n_tokens * samples)
        )
        noise = NoiseKey(_ids(n_tokens * samples), _ids(share.sequences * samples))
        context = Context(layout, noise, num_tokens=torch.empty((), device=_META))
        output = backbone(inputs_ND, context)
        batch = _batch(config, share)
        states_KTD = [trained(batch, states_ND) for states_ND in output.states_ND.chunk(samples)]
        if config.loss.temperature != 1:
            states_KTD = [states_TD / config.loss.temperature for states_TD in states_KTD]
        if config.loss.kind == "full":
            loss = _full(config, tracer, states_KTD, table, gathered, chunk_tokens(config, rows, device))
        else:
            loss = _candidates(config, states_KTD, looked, batch)
        loss = loss + output.generative_loss
        tracer.forward_ended()
        loss.backward()
    return tracer.trace


def _full(
    config: RunConfig, tracer: Tracer, states_KTD: list[Tensor], table: Tensor, gathered: int, chunk: int
) -> Tensor:
    states_ND = torch.cat(states_KTD) if len(states_KTD) > 1 else states_KTD[0]
    whole = states_ND.repeat(gathered, 1) if gathered > 1 else states_ND
    traced = min(len(whole), _CHUNKS * chunk)
    part, ids, weights = whole[:traced], _ids(traced), torch.empty(traced, device=_META)
    before = {name: (work.calls, work.flops, work.bytes) for name, work in tracer.trace.work.items()}
    if len(states_KTD) > 1:
        weights = weights + full_nll(part, table, ids, chunk, 1)
    loss = full_loss(part, table, ids, weights, chunk, 1)
    factor = len(whole) / traced - 1
    for name, work in tracer.trace.work.items():
        calls, flops, moved = before[name]
        work.calls += round((work.calls - calls) * factor)
        work.flops += (work.flops - flops) * factor
        work.bytes += (work.bytes - moved) * factor
    return loss


def _batch(config: RunConfig, share: Share) -> Batch:
    tokens, count = share.tokens, targets(config, share)
    layout = Jagged(_ids(share.sequences), share.length, _ids(tokens), _ids(tokens))
    chosen = _ids(count) if config.data.targets == "last" else None
    return Batch(_ids(tokens + share.sequences), layout, _ids(share.sequences), chosen, tokens, count, share.sequences)


def _candidates(config: RunConfig, states_KTD: list[Tensor], looked: Tensor, batch: Batch) -> Tensor:
    loss, count = config.loss, len(states_KTD[0])
    in_batch = loss.kind == "sampled" and loss.proposal == "in_batch"
    if in_batch or loss.shares_negatives:
        negatives, index = _ids(len(looked) - len(batch.items_M)), None
    else:
        negatives, index = (_ids(count * _own_negatives(config)).view(count, -1) for _ in range(2))
    expected = torch.empty(negatives.shape, device=_META) if loss.kind == "sampled" else None
    candidates = Candidates(_ids(len(looked)), negatives, index, expected)
    nll_KT = torch.stack([candidate_nll(states_TD, looked, batch, candidates) for states_TD in states_KTD])
    return nll_KT.logsumexp(0).sum()


def _backbone(config: RunConfig) -> Backbone:
    with _META:
        return Backbone(config.model, config.data.max_len)


def _all_diffused(config: RunConfig) -> RunConfig:
    """On a GPU sequences that are not diffused are computed with weight 0."""
    tree = config.model_dump(mode="json")
    attention = tree["model"]["attention"]
    section = attention.get("generator", attention)
    if "diffused_share" in section:
        section["diffused_share"] = 1.0
    return RunConfig.model_validate(tree)


@contextmanager
def _budgets(device: str) -> Iterator[None]:
    """Chunks of the losses are sized by device: meta tensors stand for one on `device`."""
    budgets = (sampled.ROWS_BYTES, objective.SCORES_BYTES)
    for budget in budgets:
        budget["meta"] = budget[device]
    try:
        yield
    finally:
        for budget in budgets:
            del budget["meta"]


def _ids(count: int) -> Tensor:
    return torch.empty(count, dtype=torch.int64, device=_META)


def _samples(config: RunConfig) -> int:
    generative = config.model.generative
    return generative.train_samples if isinstance(generative, VariationalAttention) else 1


def _own_negatives(config: RunConfig) -> int:
    return 1 if config.loss.kind == "bce" else config.loss.num_negatives


def _kernels(device: str) -> Callable[[Tensor, Tensor | None], int]:
    """Which kernel torch takes for attention: flash without a mask (in half precision on CUDA), else the one that
    takes masks (CUDA) or plain products (CPU, where a learned mask needs a gradient).
    """

    def choose(query: Tensor, mask: Tensor | None) -> int:
        if device == "cuda":
            return _FLASH if mask is None and query.dtype != torch.float32 else _EFFICIENT
        return _FLASH if mask is None else _MATH

    return choose
