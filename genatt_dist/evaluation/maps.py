"""Attention maps of a few users, for looking at: `maps-SPLIT.json` beside an evaluation, drawn in the report.

The same users are taken for every run on the same data, so that their maps can be compared.

Legend: U users shown, n longest of their histories, N their real tokens, M those with a choice (rows i ≥ 1), H heads.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from data_pipeline import format as shards
from genatt_dist.attention.attend import attention_map
from genatt_dist.attention.noise import derive
from genatt_dist.data.arrays import Ints, items_of
from genatt_dist.data.histories import Histories
from genatt_dist.data.sequences import Sequences
from genatt_dist.embedding.features import input_rows
from genatt_dist.evaluation.evaluate import sampling_context
from genatt_dist.model.diagnostics import ROUNDING, own_maps, relative_entropy, resampled, total_variation
from genatt_dist.model.jagged import Jagged

if TYPE_CHECKING:  # it imports all of training
    from genatt_dist.serving.trained import Trained

USERS = 6
LONG = 10  # items a history should have to show something
WIDEST = 50  # newest items of a history that are drawn
SAMPLES, KEPT = 32, 4  # maps that are averaged, and those of them that are kept
UNIT = 1e-4  # weights are stored as whole multiples of it


def write_maps(path: Path, trained: Trained, split: str) -> None:
    """Write the maps of USERS users at the best checkpoint; the file appears whole or not at all.

    Its `users` hold: user_id; item_ids and titles (None without such a column), oldest first, at most the WIDEST
    newest, and how many `older` ones the model saw; target_id, target_title; maps. A map has block, head, the `mean` of
    SAMPLES samples and KEPT of the `samples`, each as its lower triangle, row after row, in UNITs (older items take
    what a row lacks to 1); and over all rows i ≥ 1 the mean `entropy` of a sample relative to uniform and the mean
    `total_variation` between two. Where nothing is random there are no samples, and total_variation is None.
    """
    sequences = trained.sequences
    users = choose(sequences, split, trained.config.data.max_len)
    report: dict[str, Any] = {"split": split, "step": trained.step, "unit": UNIT, "num_samples": SAMPLES, "users": []}
    if len(users):
        lengths = sequences.history_end(split)[users] - sequences.offsets[users]
        events, first = sequences.take(sequences.offsets[users], lengths + 1)  # with the target
        items, end = items_of(events), first + lengths
        targets = items[end]
        histories = Histories.of(
            events,
            first,
            end,
            users,
            trained.config.data.max_len,
            trained.device,
            targets.astype(np.int64),
            sequences.features,
        )
        item_ids, titles = _names(trained)
        drawn = _draw(trained, histories)
        seen = histories.layout.lengths_B.tolist()
        for place, user in enumerate(users):
            older = max(0, seen[place] - WIDEST)
            shown = items[end[place] - seen[place] + older : end[place]]
            target = targets[place]
            entry = {
                "user_id": sequences.user_ids[int(user)].as_py(),
                "older": older,
                "item_ids": [item_ids[item] for item in shown],
                "titles": [titles[item] for item in shown] if titles else None,
                "target_id": item_ids[target],
                "target_title": titles[target] if titles else None,
                "maps": drawn[place],
            }
            report["users"].append(entry)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(report, separators=(",", ":"), ensure_ascii=False), encoding="utf-8")
    temporary.rename(path)


def choose(sequences: Sequences, split: str, max_len: int) -> Ints:
    """Indices of at most USERS users with a target and a history of LONG items (or of the longest there are).

    Which ones is a function of their indices alone, not of the run.
    """
    lengths = np.minimum(sequences.history_end(split) - sequences.offsets[:-1], min(LONG, max_len))
    candidates = np.flatnonzero(sequences.has_target(split) & (lengths >= 2))
    key = derive(0, torch.from_numpy(candidates))
    assert isinstance(key, Tensor)
    order = np.lexsort((key.numpy(), -lengths[candidates]))
    return np.sort(candidates[order[:USERS]])


@torch.no_grad()
def _draw(trained: Trained, histories: Histories) -> list[list[dict[str, Any]]]:
    """The entries of `maps` of each user."""
    context, backbone, layout = sampling_context(histories, trained.config), trained.backbone, histories.layout
    rows_ND = input_rows(trained.table, histories).to(next(backbone.parameters()).dtype)

    def sample(number: int) -> dict[int, Tensor]:
        """Maps [U, H, n, n] by block."""
        output = backbone(rows_ND, resampled(context, number) if number else context, sample=True)
        return {block: attention_map(output.maps[block], layout).float() for block in own_maps(output.maps)}

    samples = [sample(0), sample(1)]
    random = any(
        bool(total_variation(samples[0][block], samples[1][block], layout).mean() > ROUNDING) for block in samples[0]
    )
    samples = [*samples, *map(sample, range(2, SAMPLES))] if random else samples[:1]
    entries: list[list[dict[str, Any]]] = [[] for _ in range(layout.size)]
    for block in samples[0]:
        for user, drawn in enumerate(_entries(block, [one[block] for one in samples], layout)):
            entries[user] += drawn
    return entries


def _entries(block: int, maps: list[Tensor], layout: Jagged) -> Iterator[list[dict[str, Any]]]:
    """The entries of one block, one a head, user by user. maps: samples [U, H, n, n]."""
    row_M, mean_UHnn = layout.row_N[layout.position_N > 0], torch.stack(maps).mean(0)
    entropy_MH = torch.stack([relative_entropy(a, layout) for a in maps]).mean(0)
    variations = [total_variation(a, b, layout) for a, b in pairwise(maps)]
    variation_MH = torch.stack(variations).mean(0) if variations else None
    for user, length in enumerate(layout.lengths_B.tolist()):
        mine_M = row_M == user
        yield [
            {
                "block": block,
                "head": head,
                "entropy": _rounded(entropy_MH[mine_M, head]),
                "total_variation": None if variation_MH is None else _rounded(variation_MH[mine_M, head]),
                "mean": _triangle(mean_UHnn[user, head], length),
                "samples": [_triangle(a[user, head], length) for a in maps[:KEPT]] if len(maps) > 1 else [],
            }
            for head in range(mean_UHnn.shape[1])
        ]


def _rounded(values_M: Tensor) -> float:
    return round(float(values_M.mean()), 4)


def _triangle(a_nn: Tensor, length: int) -> list[int]:
    """The lower triangle of the newest WIDEST rows and columns, row after row, in UNITs."""
    newest = slice(max(0, length - WIDEST), length)
    a_nn = a_nn[newest, newest]
    return (a_nn[torch.ones_like(a_nn, dtype=torch.bool).tril()] / UNIT).round().int().tolist()


def _names(trained: Trained) -> tuple[list[Any], list[str] | None]:
    """Original id and title of each dense id (index 0 is padding); None where the vocabulary has no titles."""
    vocabulary = shards.read_vocabulary(trained.config.data.path, trained.sequences.manifest)
    titles = [None, *vocabulary["title"].to_pylist()] if "title" in vocabulary.column_names else None
    item_ids = [None, *vocabulary["item_id"].to_pylist()]
    return item_ids, [str(title or item) for title, item in zip(titles, item_ids, strict=True)] if titles else None
