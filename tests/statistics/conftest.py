"""Models that learnt the copy law, each trained once for all tests that look at it."""

from collections.abc import Callable

import pytest
from torch import Tensor

from benchmarks import recovery
from genatt_dist.training.step import DenseModel


@pytest.fixture(scope="session")
def trained() -> Callable[[str], DenseModel]:
    """Trains an attention of the benchmark on first use: about a minute of one core each."""
    models: dict[str, DenseModel] = {}

    def get(name: str) -> DenseModel:
        if name not in models:
            models[name] = recovery.train(recovery.settings(recovery.ATTENTIONS[name]))
        return models[name]

    return get


@pytest.fixture(scope="session")
def held_out() -> Tensor:
    return recovery.held_out(256)
