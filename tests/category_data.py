"""Categories for the items of a small prepared data set, and the metrics of lists by plain loops over Python sets."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import polars as pl

from data_pipeline.format import MANIFEST, VOCABULARY
from genatt_dist.evaluation.metrics import CUTOFFS

GENRES = ("Comedy", "Drama", "Sci-Fi/Space", "War", "Western")


def add_attributes(path: Path, **columns: Sequence[object]) -> None:
    """Columns more in the vocabulary of the prepared data set at `path`, values by dense id."""
    file = path / VOCABULARY
    frame = pl.read_parquet(file).with_columns(pl.Series(name, values) for name, values in columns.items())
    frame.write_parquet(file)
    manifest = json.loads((path / MANIFEST).read_text())
    content = file.read_bytes()
    manifest["vocabulary"] |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (path / MANIFEST).write_text(json.dumps(manifest))


def add_genres(path: Path, num_items: int) -> dict[int, set[str]]:
    """Up to three of GENRES an item, none for every seventh, and a title; returns the genres by dense id."""
    draw = np.random.default_rng(5)
    lists = [
        [] if item % 7 == 0 else draw.choice(GENRES, draw.integers(1, 4), replace=False).tolist()
        for item in range(1, num_items + 1)
    ]
    add_attributes(path, title=[f"t{item}" for item in range(1, num_items + 1)], genres=lists)
    return {item: set(genres) for item, genres in enumerate(lists, start=1)}


def diversity_by_loops(
    lists: Sequence[Sequence[int]],
    popularity: Sequence[int],
    accuracy: dict[str, float],
    sets: dict[int, set[str]] | None,
    num_categories: int = len(GENRES),
) -> dict[str, float]:
    """Every metric of lists of dense ids, best first. popularity: by dense id, [V + 1]."""
    size, values = len(popularity) - 1, {}
    for k in CUTOFFS:
        shown = Counter(item for items in lists for item in items[:k])
        counts = [shown[item] for item in range(1, size + 1)]
        differences = sum(abs(a - b) for a, b in itertools.product(counts, counts))
        values[f"gini@{k}"] = differences / (2 * size * sum(counts))
        share = {item: max(popularity[item], 1) / sum(popularity) for item in shown}
        values[f"novelty@{k}"] = -sum(math.log2(share[i]) for items in lists for i in items[:k]) / sum(counts)
        if sets is None:
            continue
        covered = len(set().union(*(sets[item] for item in shown))) / num_categories
        quality = (accuracy[f"recall@{k}"] + accuracy[f"ndcg@{k}"]) / 2
        values[f"cc@{k}"], values[f"f@{k}"] = covered, 2 * quality * covered / (quality + covered)
        means = []
        for items in lists:
            known = [sets[item] for item in items[:k] if sets[item]]
            pairs = [1 - len(a & b) / len(a | b) for a, b in itertools.combinations(known, 2)]
            means += [sum(pairs) / len(pairs)] if pairs else []
        values[f"ild@{k}"] = sum(means) / len(means)
    return values
