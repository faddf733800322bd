"""Data sets with times and item attributes, and the features of a run that reads them all."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tiny_data import write_prepared

from data_pipeline.format import Manifest

ATTRIBUTES = [
    {"type": "attribute", "column": "genres"},
    {"type": "attribute", "column": "year", "buckets": 7},
    {"type": "attribute", "column": "genres", "name": "first_genres", "max_values": 2},
]
CONTEXT = [{"type": "context", "column": "hour_of_week"}, {"type": "context", "column": "gap"}]
FEATURES: list[dict[str, Any]] = [*ATTRIBUTES, *CONTEXT]


def write_with_features(
    path: Path, lists: Sequence[Sequence[int]], seed: int = 0, last_later: int = 0, **options: Any
) -> Manifest:
    """Publish the histories with random times (some equal) over years, and attributes `genres` and `year`.

    last_later: seconds that every user's last event is later.
    """
    random = np.random.default_rng(seed)
    times = [
        (1_600_000_000 + np.cumsum(random.choice([0, 1, 40, 4000, 10**6, 10**8], len(items)))).tolist()
        for items in lists
    ]
    for mine in times:
        mine[-1] += last_later
    num_items = len({item for items in lists for item in items})
    return write_prepared(path, lists, times=times, attributes=attributes_of(num_items, seed), **options)


def attributes_of(num_items: int, seed: int = 0) -> dict[str, list[Any]]:
    """Lists of 0 to 4 genres, a sixth of them null; a year each, some null."""
    random = np.random.default_rng(seed)
    names = [f"genre {number}" for number in range(9)]
    genres: list[Any] = [random.choice(names, random.integers(0, 5), replace=False).tolist() for _ in range(num_items)]
    years: list[Any] = random.integers(1950, 1990, num_items).tolist()
    for place in range(0, num_items, 6):
        genres[place] = None
        years[(place + 1) % num_items] = None
    return {"genres": genres, "year": years}
