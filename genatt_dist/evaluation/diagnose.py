"""The attention maps of a split's first users in numbers: what curves, warnings and the report show of a model.

Legend: N real tokens, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from genatt_dist.config import RunConfig
from genatt_dist.data.histories import evaluation_batches
from genatt_dist.data.sequences import Sequences
from genatt_dist.embedding.features import input_rows
from genatt_dist.embedding.table import ItemTable
from genatt_dist.evaluation.evaluate import Parts, sampling_context
from genatt_dist.model.backbone import Backbone
from genatt_dist.model.diagnostics import statistics

USERS = 256  # of the global batch: tens of thousands of rows, so two digits of every mean, for two forward passes

# Statistics that are vectors: their mean is the curve, and all their numbers are kept under this name.
VECTORS = {"kl_mean": "kl_per_dimension", "kappa": "kappa_per_head", "alpha": "alpha_per_head"}

_ALONE = Parts()


@dataclass(frozen=True)
class Diagnosis:
    """values: `attention_entropy/block0` and so on (model/diagnostics.py). vectors: `kl_per_dimension/block0` …"""

    values: dict[str, float]
    vectors: dict[str, list[float]]


@torch.no_grad()
def diagnose(
    backbone: Backbone,
    table: ItemTable,
    sequences: Sequences,
    split: str,
    config: RunConfig,
    device: torch.device,
    parts: Parts = _ALONE,
) -> Diagnosis:
    """Look at the maps of the first USERS users, the same on any number of ranks. Collective: all must be here."""
    users = max(USERS, parts.world_size)
    batches = evaluation_batches(sequences, split, config.data.max_len, users, parts.rank, parts.world_size, device)
    histories = next(iter(batches))
    rows_ND = input_rows(table, histories).to(next(backbone.parameters()).dtype)
    observed = statistics(backbone, rows_ND, sampling_context(histories, config, parts.total))
    values: dict[str, float] = {}
    vectors: dict[str, list[float]] = {}
    for name, (amount, count) in observed.items():
        mean = parts.total(amount) / parts.total(count)
        values[name] = float(mean.mean())
        statistic, _, block = name.partition("/")
        if statistic in VECTORS:
            vectors[f"{VECTORS[statistic]}/{block}"] = mean.flatten().tolist()
    return Diagnosis(values, vectors)
