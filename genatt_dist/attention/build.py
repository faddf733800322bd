"""From the configuration to the attention generator of one block."""

from __future__ import annotations

from genatt_dist.attention.base import Generator
from genatt_dist.attention.deterministic import Deterministic
from genatt_dist.attention.diffusion import Diffusion
from genatt_dist.attention.dot_product import DotProduct, NoisyDotProduct
from genatt_dist.attention.hybrid import Hybrid
from genatt_dist.attention.logits import Values
from genatt_dist.attention.options import (
    Attention,
    DeterministicAttention,
    DiffusionAttention,
    DotProductAttention,
    HybridAttention,
    NoisyDotProductAttention,
    PositionalAttention,
    RecurrentAttention,
    VariationalAttention,
)
from genatt_dist.attention.positional import Positional
from genatt_dist.attention.recurrent import Recurrent
from genatt_dist.attention.variational import Variational
from genatt_dist.config import ModelConfig


def build(attention: Attention, model: ModelConfig, max_len: int, block: int) -> Generator:
    """The generator that `attention` describes, for block 0..L−1 of `model` and histories up to `max_len`."""
    match attention:
        case DotProductAttention():
            return DotProduct(model)
        case NoisyDotProductAttention():
            return NoisyDotProduct(model, attention, block)
        case PositionalAttention():
            return Positional(model, attention, max_len)
        case RecurrentAttention():
            return Recurrent(model)
        case DeterministicAttention():
            return Deterministic(model, attention, max_len)
        case VariationalAttention():
            return Variational(model, attention, max_len, block)
        case DiffusionAttention():
            return Diffusion(model, attention, max_len, block)
        case HybridAttention():
            return Hybrid(model, build(attention.generator, model, max_len, block))


def values(attention: Attention, model: ModelConfig) -> Values:
    """Values of a block that uses another block's map: projected or not, as that attention's own."""
    match attention:
        case DotProductAttention() | NoisyDotProductAttention():
            return Values(model, projection=True)
        case HybridAttention():
            return values(attention.generator, model)
        case RecurrentAttention():
            raise ValueError("the GRU control has no map to share")
        case _:
            return Values(model, attention.value_projection)
