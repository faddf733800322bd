from collections.abc import Callable, Iterator
from pathlib import Path

import polars as pl
import pytest

from data_pipeline.config import PrepareConfig
from data_pipeline.local_ray import local_ray

SHARED_DATA = Path(__file__).parents[3] / "shared" / "data"


@pytest.fixture(scope="session")
def local_cluster() -> Iterator[None]:
    """One Ray for all tests that need one; `prepare` uses what runs."""
    with local_ray(num_cpus=2):
        yield


@pytest.fixture
def shared_data() -> Path:
    if not SHARED_DATA.is_dir():
        pytest.skip(f"no data sets at {SHARED_DATA}")
    return SHARED_DATA


@pytest.fixture
def log(tmp_path: Path) -> Callable[..., str]:
    """Writes columns to a file (kind by its ending) and returns its path."""

    def write(name: str = "log.parquet", **columns: list) -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        frame = pl.DataFrame(columns, strict=False)
        frame.write_parquet(path) if name.endswith("parquet") else frame.write_csv(path)
        return str(path)

    return write


@pytest.fixture
def options(tmp_path: Path) -> Callable[..., PrepareConfig]:
    """A config without a k-core, into a directory that does not exist yet."""

    def make(source: str, **changes: object) -> PrepareConfig:
        small = {"min_user_interactions": 1, "min_item_interactions": 1, "num_shards": 2}
        return PrepareConfig.model_validate({"source": source, "out": tmp_path / "out", **small, **changes})

    return make
