"""Appending on S3: what is copied stays in the store, and what is read is only what the new rows touch."""

from pathlib import Path

import polars as pl
import pytest
from in_process import prepare

from data_pipeline.config import PrepareConfig
from data_pipeline.format import load_manifest, verify

pytestmark = pytest.mark.s3


def test_untouched_shards_are_copied_inside_the_store(s3, faults, tmp_path: Path):
    def source(name: str, users: range) -> str:
        rows = {"user_id": users, "item_id": [user % 5 for user in users], "timestamp": [100 + user for user in users]}
        path = tmp_path / name
        pl.DataFrame(rows).write_parquet(path)
        return str(path)

    once = {"min_user_interactions": 1, "min_item_interactions": 1, "num_shards": 6}
    old = PrepareConfig.model_validate({"source": source("old.parquet", range(100)), "out": f"{s3.url}/v1", **once})
    first = prepare(old)
    before = {name: s3.get(name) for name in s3.names("v1/")}
    faults.reset()

    new = PrepareConfig(source=source("new.parquet", range(1)), out=f"{s3.url}/v2", append_to=f"{s3.url}/v1")
    made = prepare(new)
    assert {name: s3.get(name) for name in s3.names("v1/")} == before
    assert s3.names("v2/") == [name.replace("v1/", "v2/") for name in before]
    assert made.num_interactions == 101
    (changed,) = (file for file in made.files if file not in first.files)
    read = {file.path for file in first.files if faults.count("GET", key=f"v1/{file.path}")}
    assert read == {changed.path, first.files[0].path}  # of the first, the footer tells the type of ids
    assert {file.path for file in first.files if faults.count("GET", key=f"v1/{file.index.path}")} == {changed.path}
    verify(f"{s3.url}/v2", load_manifest(f"{s3.url}/v2"))
