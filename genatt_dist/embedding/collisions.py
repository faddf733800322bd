"""How often items share a row where `genatt prepare --hash-buckets` gave ids by hash."""

from __future__ import annotations

import io
from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from data_pipeline.format import Manifest, read_intact


@dataclass(frozen=True)
class Collisions:
    """items: seen by the preparation. rows: of the table. used: rows with an item. mean, most: items of a used row.
    shared_items, shared_events: shares of items and of their interactions in rows of two items or more.
    """

    items: int
    rows: int
    used: int
    mean: float
    most: int
    shared_items: float
    shared_events: float

    def __str__(self) -> str:
        return (
            f"hash buckets: {self.items:,} items in {self.used:,} of {self.rows:,} rows, {self.mean:.2f} a row "
            f"(at most {self.most}); {self.shared_events:.1%} of events are of items that share their row"
        )

    def as_dict(self) -> dict[str, float]:
        """For `summary.json`."""
        return asdict(self)


def collisions(path: str, manifest: Manifest) -> Collisions | None:
    """Statistics of the prepared directory `path`; None where every item has an id of its own.

    Raises GenattError: the file of the buckets is missing or damaged.
    """
    if manifest.buckets is None:
        return None
    table = pq.read_table(io.BytesIO(read_intact(path, manifest.buckets)), columns=["dense_id", "count"])
    return of_buckets(table["dense_id"].to_numpy(), table["count"].to_numpy(), manifest.num_items)


def of_buckets(dense_ids: npt.NDArray[np.integer], counts: npt.NDArray[np.integer], rows: int) -> Collisions:
    """dense_ids, counts: of every item seen, [items]; rows: the largest dense id there may be."""
    sizes = np.bincount(dense_ids, minlength=rows + 1)
    shared = sizes[dense_ids] > 1
    used = int((sizes > 0).sum())
    return Collisions(
        items=len(dense_ids),
        rows=rows,
        used=used,
        mean=len(dense_ids) / max(1, used),
        most=int(sizes.max(initial=0)),
        shared_items=float(shared.mean()) if len(shared) else 0.0,
        shared_events=float(counts[shared].sum() / max(1, counts.sum())),
    )
