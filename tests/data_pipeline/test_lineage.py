"""A version knows all versions it comes from, however many there are in between."""

from pathlib import Path

import polars as pl
from in_process import prepare

from data_pipeline.config import PrepareConfig
from data_pipeline.format import load_manifest, manifest_hash


def test_a_version_descends_from_every_version_before(tmp_path: Path) -> None:
    def source(number: int, users: range) -> str:
        items = [(user + number + place) % 30 for place in range(3) for user in users]
        rows = {"user_id": list(users) * 3, "item_id": items, "timestamp": [100 * number + item for item in items]}
        pl.DataFrame(rows).write_parquet(tmp_path / f"{number}.parquet")
        return str(tmp_path / f"{number}.parquet")

    first = {"source": source(1, range(40)), "out": str(tmp_path / "v1")}
    prepare(PrepareConfig.model_validate(first | {"min_user_interactions": 1, "min_item_interactions": 1}))
    for number in (2, 3):
        before, after = str(tmp_path / f"v{number - 1}"), str(tmp_path / f"v{number}")
        prepare(PrepareConfig(source=source(number, range(5)), out=after, append_to=before))
    hashes = [manifest_hash(str(tmp_path / f"v{number}")) for number in (1, 2)]
    last = load_manifest(str(tmp_path / "v3"))
    assert (last.parent, last.ancestors, last.lineage) == (hashes[1], tuple(hashes), frozenset(hashes))
    assert load_manifest(str(tmp_path / "v1")).lineage == frozenset()
    assert "ancestors" not in (tmp_path / "v1" / "manifest.json").read_text()  # as before there was the word
