"""What `genatt inspect` tells of prepared data, held against the histories they were written from."""

import json
from collections import Counter
from pathlib import Path

import fsspec
import numpy as np
import polars as pl
import pytest
from rich.console import Console
from tiny_data import histories, write_prepared

from data_pipeline import format as shards
from data_pipeline import inspection
from data_pipeline.errors import GenattError
from data_pipeline.format import LedgerEntry, load_manifest
from data_pipeline.inspection import Bin, SplitSizes, TopItem, histogram, inspect, quantiles
from data_pipeline.splits import RandomUsers


def lengths() -> list[int]:
    return sorted(map(len, histories()))


def rewrite(directory: Path, **changes: object) -> None:
    """Publishes another manifest over the one at `directory`."""
    manifest = load_manifest(str(directory))
    (directory / "manifest.json").write_bytes(manifest.model_copy(update=changes).to_json())


def shown(found: inspection.Inspection) -> str:
    console = Console(width=160, record=True, quiet=False, file=open("/dev/null", "w"))  # noqa: SIM115
    inspection.show(found, console)
    return console.export_text()


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    write_prepared(tmp_path / "tiny", histories())
    return tmp_path / "tiny"


def test_counts_split_and_files(prepared: Path) -> None:
    found, manifest = inspect(str(prepared)), load_manifest(str(prepared))
    long = [length for length in lengths() if length >= 3]
    assert (found.name, found.users, found.items, found.interactions) == ("tiny", 48, 40, sum(lengths()))
    assert found.split_sizes == SplitSizes(sum(lengths()) - 2 * len(long), len(long), len(long))
    assert found.files.number == 2
    assert found.files.bytes == sum(file.stat().st_size for file in (prepared / "shards").iterdir())
    assert found.bytes == sum(path.stat().st_size for path in prepared.rglob("*.parquet"))
    assert (found.files.users_min, found.files.users_max, found.files.skew) == (24, 24, 1.0)
    assert found.manifest_hash == shards.manifest_hash(str(prepared))
    assert found.config_hash == manifest.config_hash
    assert (found.parent, found.drift, found.time_unit) == (None, None, None)


def test_lengths(prepared: Path) -> None:
    found, sizes = inspect(str(prepared)), lengths()
    assert found.lengths == {
        "min": 1,
        "p50": int(np.quantile(sizes, 0.5, method="inverted_cdf")),
        "p90": int(np.quantile(sizes, 0.9, method="inverted_cdf")),
        "p99": int(np.quantile(sizes, 0.99, method="inverted_cdf")),
        "max": 40,
    }
    assert sum(one.users for one in found.histogram) == 48
    for one in found.histogram:
        assert one.users == sum(one.low <= size <= one.high for size in sizes)


def test_top_items_by_original_id(prepared: Path) -> None:
    counts = Counter(item for items in histories() for item in items)
    best = sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))
    found = inspect(str(prepared), top=7).top_items
    assert found == tuple(TopItem(item, None, count, count / counts.total()) for item, count in best[:7])
    assert inspect(str(prepared), top=0).top_items == ()
    assert len(inspect(str(prepared), top=1000).top_items) == 40


def test_titles_and_buckets(copy: Path) -> None:
    words = pl.read_parquet(copy / "vocabulary/items.parquet")
    titled = words.with_columns(title=pl.format("no [{}]", "item_id"), vector=pl.lit([1.0, 2.0]))
    titled.write_parquet(copy / "vocabulary/items.parquet")
    first = inspect(str(copy), top=1).top_items[0]
    assert first.title == f"no [{first.item_id}]"
    assert first.title in shown(inspect(str(copy)))

    pl.DataFrame({"item_id": ["a", "b", "c"], "dense_id": [1, 1, 2], "count": [3, 9, 3]}).write_parquet(
        copy / "vocabulary/buckets.parquet"
    )
    manifest = load_manifest(str(copy))
    rewrite(copy, buckets=manifest.vocabulary.model_copy(update={"path": "vocabulary/buckets.parquet"}))
    assert [(item.item_id, item.count) for item in inspect(str(copy)).top_items] == [("b", 9), ("a", 3), ("c", 3)]


def test_another_split_and_what_an_appended_version_tells(tmp_path: Path) -> None:
    path = tmp_path / "users"
    manifest = write_prepared(path, histories(), split=RandomUsers(valid_share=0.3, test_share=0.2))
    total = manifest.num_interactions
    ledger = (LedgerEntry(stage="write", rows_in=5, rows_out=total, dropped={"short": 2}, added=total - 3),)
    rewrite(path, ledger=ledger, parent="f" * 64, drift={"new_items": 1234}, time_unit="ms")
    index = pl.concat(pl.read_parquet(file) for file in (path / "index").iterdir())
    held = index.select((pl.col("valid", "test") >= 0).sum()).row(0)
    found = inspect(str(path))
    assert found.split == {"rule": "users", "valid_share": 0.3, "test_share": 0.2, "seed": 0}
    assert found.split_sizes == SplitSizes(int(index["train"].sum()), *held)
    assert 0 < held[0] < 48
    text = shown(found)
    for part in ("f" * 64, "new_items 1,234", "time unit: ms", f"2 short, +{total - 3:,} of the parent"):
        assert part in text


def test_the_same_from_a_remote_store(prepared: Path) -> None:
    remote = fsspec.filesystem("memory")
    for path in prepared.rglob("*"):
        if path.is_file():
            remote.pipe_file(f"/inspected/{path.relative_to(prepared)}", path.read_bytes())
    local, away = inspect(str(prepared)).as_data(), inspect("memory://inspected").as_data()
    assert away == local | {"path": "memory://inspected"}
    assert json.loads(json.dumps(away)) == json.loads(json.dumps(local | {"path": "memory://inspected"}))


def test_sequences_stay_unread(copy: Path) -> None:
    expected = inspect(str(copy))
    for file in (copy / "shards").iterdir():
        file.unlink()
    assert inspect(str(copy)) == expected
    with pytest.raises(GenattError, match=r"part-00000.parquet is missing"):
        inspection.verify(str(copy), Console(stderr=True))


def test_verify(copy: Path) -> None:
    inspection.verify(str(copy), Console(stderr=True))
    with (copy / "shards" / "part-00001.parquet").open("ab") as file:
        file.write(b"x")
    with pytest.raises(GenattError, match=r"part-00001.parquet is damaged: expected sha256"):
        inspection.verify(str(copy), Console(stderr=True))


def test_an_index_that_contradicts_the_manifest(copy: Path) -> None:
    index = copy / "index" / "part-00000.parquet"
    pl.read_parquet(index)[1:].write_parquet(index)
    with pytest.raises(GenattError, match=r"index/part-00000.parquet has 23 users and .* the manifest says 24 and"):
        inspect(str(copy))


@pytest.mark.parametrize("name", ["index/part-00000.parquet", "vocabulary/items.parquet", "manifest.json"])
def test_damage_is_one_line(name: str, copy: Path) -> None:
    (copy / name).write_bytes((copy / name).read_bytes()[:-9])
    with pytest.raises(GenattError, match=name) as caught:
        inspect(str(copy))
    assert "\n" not in str(caught.value)


def test_nothing_prepared(tmp_path: Path) -> None:
    with pytest.raises(GenattError, match=r"is no prepared data set \(no manifest.json there\)"):
        inspect(str(tmp_path))


def test_bins_and_quantiles() -> None:
    counts = np.bincount([1, 2, 3, 4, 5, 6, 7, 8, 11, 12, 40])
    assert histogram(counts) == tuple(
        Bin(*bounds)
        for bounds in [
            (1, 1, 1), (2, 2, 1), (3, 3, 1), (4, 5, 2), (6, 7, 2), (8, 11, 2), (12, 15, 1), (16, 22, 0), (23, 31, 0),
            (32, 45, 1),
        ]
    )  # fmt: skip
    assert histogram(np.bincount([9, 10])) == (Bin(8, 11, 2),)
    assert histogram(np.zeros(1, np.int64)) == ()
    assert quantiles(np.bincount([3] * 99 + [50])) == {"min": 3, "p50": 3, "p90": 3, "p99": 3, "max": 50}
    assert quantiles(np.zeros(1, np.int64)) == {"min": 0, "p50": 0, "p90": 0, "p99": 0, "max": 0}
