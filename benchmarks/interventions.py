"""What is done to a trained model to show what its maps hang on: states of another user, a latent that knows nothing.

Legend: B sequences, n positions of each, N = B·n tokens, D width, M rows of maps, Z latent width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from genatt_dist.attention.decoder import Latent, Posterior
from genatt_dist.model.backbone import Backbone


@contextmanager
def states_of_another_user(backbone: Backbone, positions: int) -> Iterator[None]:
    """Every user's maps are made from a neighbour's S; tokens, and so values, stay. All users have n `positions`."""
    assert backbone.encoder is not None, "this attention reads no states"

    def roll(_module: Any, _arguments: Any, s_ND: Tensor) -> Tensor:
        return s_ND.unflatten(0, (-1, positions)).roll(1, 0).flatten(0, 1)

    hook = backbone.encoder.register_forward_hook(roll)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def latent_of_the_prior(backbone: Backbone) -> Iterator[None]:
    """N(0, I) in place of q(z | S), in all blocks."""

    def forget(_module: Any, _arguments: Any, posterior: Posterior) -> Posterior:
        return Posterior(torch.zeros_like(posterior.mu_MZ), torch.zeros_like(posterior.log_var_MZ))

    hooks = [module.register_forward_hook(forget) for module in backbone.modules() if isinstance(module, Latent)]
    assert hooks, "this attention has no latent"
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
