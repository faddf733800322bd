"""Statistics of items that share a row are those of counting by hand."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from data_pipeline.format import BUCKETS, Manifest, WrittenFile
from genatt_dist.embedding.collisions import collisions, of_buckets


def test_collisions_are_counted_by_items_and_by_events() -> None:
    found = of_buckets(np.array([1, 1, 1, 3, 4, 4]), np.array([5, 1, 2, 20, 10, 2]), rows=6)
    assert (found.items, found.rows, found.used, found.most) == (6, 6, 3, 3)
    assert found.mean == pytest.approx(2)
    assert found.shared_items == pytest.approx(5 / 6)
    assert found.shared_events == pytest.approx(20 / 40)
    assert "6 items in 3 of 6 rows, 2.00 a row (at most 3); 50.0% of events" in str(found)


def test_no_item_is_no_collision() -> None:
    found = of_buckets(np.array([], np.int32), np.array([], np.int64), rows=4)
    assert (found.mean, found.most, found.shared_events) == (0, 0, 0)


def _manifest(buckets: WrittenFile | None) -> Manifest:
    return Manifest.model_construct(buckets=buckets, num_items=5)  # type: ignore[call-arg]


def test_collisions_are_read_from_what_prepare_wrote(tmp_path: Path) -> None:
    file = tmp_path / BUCKETS
    file.parent.mkdir()
    pl.DataFrame({"item_id": ["a", "b", "c"], "dense_id": [2, 2, 1], "count": [3, 1, 4]}).write_parquet(file)
    content = file.read_bytes()
    written = WrittenFile(path=BUCKETS, bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
    found = collisions(str(tmp_path), _manifest(written))
    assert found is not None
    assert (found.items, found.rows, found.used, found.most, found.shared_events) == (3, 5, 2, 2, 0.5)
    assert collisions(str(tmp_path), _manifest(None)) is None
