"""A run directory on S3: published while requests fail, fetched whole."""

from pathlib import Path

import pytest

from genatt_dist import run_storage

pytestmark = pytest.mark.s3


def test_published_through_errors_and_fetched(s3, faults, tmp_path: Path) -> None:
    run, url = tmp_path / "run", f"{s3.url}/runs/a"
    (run / "tensorboard").mkdir(parents=True)
    (run / "metrics.jsonl").write_text('{"step": 1}\n')
    (run / "tensorboard" / "events").write_bytes(b"\0" * 1000)
    faults.fail(next_n=3)
    with run_storage.mirrored(url, run, every=60):
        (run / "summary.json").write_text("{}")
    assert s3.names("runs/a/") == [f"runs/a/{name}" for name in run_storage.names(url)]
    run_storage.fetch(url, tmp_path / "other")
    assert (tmp_path / "other" / "tensorboard" / "events").read_bytes() == b"\0" * 1000
    run_storage.remove(url, "summary.json")
    assert run_storage.names(url) == ["metrics.jsonl", "tensorboard/events"]
