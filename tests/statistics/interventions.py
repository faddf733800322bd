"""What is done to a trained model to show what its maps hang on: states of another user, a latent that knows nothing.

Legend: B sequences, n positions of each, N = B·n tokens, D width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from benchmarks.recovery import POSITIONS
from genatt_dist.attention.decoder import Latent, Posterior
from genatt_dist.training.step import DenseModel


@contextmanager
def states_of_the_next_user(model: DenseModel) -> Iterator[None]:
    """Every user's maps are made from the next user's S; tokens, and so values, stay. All lengths are equal."""

    def roll(module, arguments, s_ND):
        return s_ND.unflatten(0, (-1, POSITIONS)).roll(1, 0).flatten(0, 1)

    hook = model.backbone.encoder.register_forward_hook(roll)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def latent_of_the_prior(model: DenseModel) -> Iterator[None]:
    """z ~ N(0, I) in place of q(z | S)."""

    def forget(module, arguments, posterior):
        return Posterior(torch.zeros_like(posterior.mu_MZ), torch.zeros_like(posterior.log_var_MZ))

    hooks = [module.register_forward_hook(forget) for module in model.modules() if isinstance(module, Latent)]
    assert hooks
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
