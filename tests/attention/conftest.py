"""Small layouts and their noise, for the tests of attention."""

from collections.abc import Callable

import pytest
import torch

from genatt_dist.attention.noise import NoiseKey
from genatt_dist.model.context import Context
from genatt_dist.model.jagged import Jagged


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def make_context() -> Callable[..., Context]:
    def make(*lengths: int, width: int | None = None, step: int = 0) -> Context:
        layout = Jagged.of(torch.tensor(lengths), width or max(lengths), sum(lengths))
        ids = torch.arange(len(lengths))
        return Context.whole(layout, NoiseKey.make(7, step, ids, layout.row_N, layout.position_N))

    return make
