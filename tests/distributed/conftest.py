"""The data and the base configuration of the tests that start several processes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tiny_data import write_prepared

from genatt_dist import config as configuration
from genatt_dist.config import RunConfig

_NUM_USERS = 240
_NUM_ITEMS = 200  # with the padding row 201: two ranks get 101 and 100 rows
_BASE = """
data: {{path: {path}, max_len: 12, windows: all}}
model: {{hidden_size: 16, num_heads: 2, num_blocks: 2, dropout: 0.2}}
table: {{kind: sharded, init_std: 0.1}}
loss: {{kind: sampled, num_negatives: 32}}
training: {{batch_sequences: 24, learning_rate: 0.1, optimizer: sgd, zero_stage: 1}}
evaluation: {{batch_users: 64}}
world_size: 2
"""


def _histories(seed: int) -> list[list[int]]:
    """Users who step 1 or 3 items on most of the time, so that there is something to learn; every item is there."""
    random = np.random.default_rng(seed)
    result = []
    for user in range(_NUM_USERS):
        length = int(random.integers(2, 21))
        steps = np.where(random.random(length) < 0.8, random.choice((1, 3)), random.integers(0, _NUM_ITEMS, length))
        result.append(((user + steps.cumsum() - steps[0]) % _NUM_ITEMS + 1).tolist())
    return result


@pytest.fixture(scope="session")
def write_set() -> Callable[[Path, int], Path]:
    """Publishes the sequence shards of a seed at a path, and returns it."""

    def write(path: Path, seed: int) -> Path:
        assert write_prepared(path, _histories(seed)).num_items == _NUM_ITEMS
        return path

    return write


@pytest.fixture(scope="session")
def tiny_set(write_set: Callable[[Path, int], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sequence shards that no test changes."""
    return write_set(tmp_path_factory.mktemp("shards"), 0)


@pytest.fixture(scope="session")
def make_config(tiny_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., RunConfig]:
    """A small sharded run on two ranks with `key=value` overrides."""
    base = tmp_path_factory.mktemp("config") / "base.yaml"
    base.write_text(_BASE.format(path=tiny_set))

    def make(*overrides: str) -> RunConfig:
        return configuration.load(base, overrides)

    return make
