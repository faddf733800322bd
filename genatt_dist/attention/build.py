"""From the configuration to the attention generator of one block."""

from __future__ import annotations

from genatt_dist.attention.base import Generator
from genatt_dist.attention.diffusion import Diffusion
from genatt_dist.attention.dot_product import DotProduct
from genatt_dist.attention.variational import Variational
from genatt_dist.config import Attention, DiffusionAttention, ModelConfig, VariationalAttention


def build(attention: Attention, model: ModelConfig, max_len: int, block_index: int) -> Generator:
    """The generator that `attention` describes, for block 0..L−1 of `model` and histories up to `max_len`."""
    if isinstance(attention, VariationalAttention):
        return Variational(model, attention, max_len, block_index)
    if isinstance(attention, DiffusionAttention):
        return Diffusion(model, attention, max_len, block_index)
    return DotProduct(model)
