"""What goes to the cluster is the program: no data, no runs, no tests, and nothing hidden."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_pipeline.errors import GenattError
from jobs import packaging


def write(root: Path, *paths: str, size: int = 10) -> Path:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(b"x" * size)
    return root


def test_data_runs_tests_and_caches_stay_here(tmp_path: Path) -> None:
    kept = ["pyproject.toml", "genatt_dist/data/batches.py", "configs/a.yaml", "benchmarks/steps/run.py"]
    left = [
        *("data/a.py", "runs/a/config.yaml", "shards/a/manifest.json", "tests/test_a.py", "benchmarks/results/a.json"),
        *(".git/config", ".venv/a.py", ".hidden", "genatt_dist/__pycache__/a.pyc", "genatt_dist/big.parquet"),
        *("my_env/pyvenv.cfg", "my_env/lib/a.py", "docs/a.log", "genatt_dist.egg-info/PKG-INFO"),
    ]
    root = write(tmp_path, *kept, *left)
    (root / "dangling").symlink_to(root / "nowhere")
    found = packaging.survey(root)
    assert sorted(found.files) == sorted(kept)
    assert found.bytes == 40
    assert sorted(packaging.survey(root, ["configs", "*.toml"]).files) == sorted(
        ["genatt_dist/data/batches.py", "benchmarks/steps/run.py"]
    )


def test_this_checkout_fits_and_holds_what_a_job_imports() -> None:
    found = packaging.survey(packaging.checkout())
    found.check()
    assert found.bytes < 10 << 20
    assert {"jobs/train.py", "genatt_dist/training/trainer.py", "configs/pipeline.yaml"} <= found.files.keys()
    assert {path.split("/")[0] for path in found.files}.isdisjoint({"tests", "runs", "shards", "data", ".git"})


def test_too_large_a_package_is_refused_with_its_biggest_directories(tmp_path: Path) -> None:
    root = write(write(tmp_path, "maps/a.bin", size=5 << 20), "genatt_dist/a.py", size=1 << 20)
    with pytest.raises(GenattError) as refused:
        packaging.survey(root).check(limit=2 << 20)
    assert "has 6.0 MiB, Ray takes 2.0 MiB: name what the job does not need by --exclude" in str(refused.value)
    assert str(refused.value).endswith("the biggest are maps (5.0 MiB), genatt_dist (1.0 MiB)")
    packaging.survey(root, ["maps"]).check(limit=2 << 20)


def test_documents_lie_beside_the_files_and_nothing_is_left(tmp_path: Path) -> None:
    package = packaging.survey(write(tmp_path, "genatt_dist/a.py"))
    with package.staged({"job.yaml": "run: x"}) as directory:
        assert (directory / "genatt_dist/a.py").read_bytes() == b"x" * 10
        assert (directory / "job.yaml").read_text() == "run: x"
    assert not directory.exists()
    assert not (tmp_path / "job.yaml").exists()
