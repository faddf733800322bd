"""The data and the base configuration of the tests that start several processes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_shards

from genatt_dist import config as configuration
from genatt_dist.config import RunConfig

_BASE = """
data: {{path: {path}, max_len: 12, windows: all}}
model: {{hidden_size: 16, num_heads: 2, num_blocks: 2, dropout: 0.2}}
table: {{kind: sharded, init_std: 0.1}}
loss: {{kind: sampled, num_negatives: 32}}
training: {{batch_sequences: 24, learning_rate: 0.1, optimizer: sgd, zero_stage: 1}}
evaluation: {{batch_users: 64}}
world_size: 2
"""


@pytest.fixture(scope="session")
def tiny_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sequence shards that no test changes."""
    return tiny_shards.write(tmp_path_factory.mktemp("shards"))


@pytest.fixture(scope="session")
def make_config(tiny_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., RunConfig]:
    """A small sharded run on two ranks with `key=value` overrides."""
    base = tmp_path_factory.mktemp("config") / "base.yaml"
    base.write_text(_BASE.format(path=tiny_set))

    def make(*overrides: str) -> RunConfig:
        return configuration.load(base, overrides)

    return make
