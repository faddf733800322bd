"""One Ray on this machine for all tests of a module, a data set, and what a run of it says when nothing disturbs it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from recorded import losses, train_rank
from tiny_data import histories, run_config, write_prepared

from data_pipeline.local_ray import local_ray
from genatt_dist.config import RunConfig

sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))  # `ranks`


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """Two CPUs."""
    with local_ray(2):
        yield


@pytest.fixture(scope="session")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., RunConfig]:
    """A run of two ranks with D-GenAtt, dropout and its noise, of 36 short steps; sections change it."""
    shards = tmp_path_factory.mktemp("ray-train") / "data"
    write_prepared(shards, histories())

    def make(world_size: int = 2, **sections: dict[str, Any]) -> RunConfig:
        base: dict[str, dict[str, Any]] = {
            "model": {"dropout": 0.2, "attention": {"type": "diffusion", "rank": 4, "generator_size": 12}},
            "training": {"epochs": 4, "evaluate_every": 2, "batch_sequences": 4, "checkpoint_every": 1},
            "ray": {"gpus_per_worker": 0},
        }
        for name, values in sections.items():
            base[name] = base.get(name, {}) | values
        return run_config(shards, **base).model_copy(update={"world_size": world_size})

    return make


@pytest.fixture(scope="session")
def reference(make: Callable[..., RunConfig], tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """Losses of two ranks that no launcher started and nothing disturbs, of every step."""
    import ranks

    run = tmp_path_factory.mktemp("reference")
    ranks.run(train_rank, 2, make(), run, seconds=120)
    found = losses(run)
    assert len(found) == max(found) == 36
    return found
