"""Configurations and batches the tests of the model share."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable

import torch
from torch import Tensor

from genatt_dist.attention.noise import NoiseKey
from genatt_dist.attention.options import (
    DeterministicAttention,
    DiffusionAttention,
    DotProductAttention,
    HybridAttention,
    NoisyDotProductAttention,
    PositionalAttention,
    RecurrentAttention,
    VariationalAttention,
)
from genatt_dist.config import ModelConfig
from genatt_dist.model.backbone import Backbone
from genatt_dist.model.context import Context, identity
from genatt_dist.model.jagged import Jagged

MAX_LEN = 8
WIDTH = 16
LENGTHS = (5, 1, 8, 3)

_DECODED = {"rank": 4, "latent_size": 6, "generator_size": 12}
_SMALL = {**_DECODED, "free_bits": 0.09}
ATTENTIONS = {
    "dot_product": DotProductAttention(),
    "variational-factor": VariationalAttention(**_SMALL, inference="sample", query_projection=True),
    "variational-matrix": VariationalAttention(
        **_SMALL, form="matrix", inference="sample", decoder_input="states_items"
    ),
    "variational-mc": VariationalAttention(**_SMALL, inference="mc", mc_samples=3, value_projection=True),
    "diffusion-factor": DiffusionAttention(**_SMALL, diffusion_steps=6, sampling_steps=3, eta=0.5),
    "diffusion-matrix": DiffusionAttention(**_SMALL, form="matrix", diffusion_steps=6, sampling_steps=6, eta=1.0),
    "diffusion-unrolled": DiffusionAttention(**_SMALL, diffusion_steps=4, train_sampler="unrolled", schedule="cosine"),
    "diffusion-literal": DiffusionAttention(**_SMALL, form="matrix", diffusion_steps=4, literal=True, eta=1.0),
    "noisy_dot_product": NoisyDotProductAttention(noise=0.7, inference="sample"),
    "positional": PositionalAttention(),
    "positional-projected": PositionalAttention(value_projection=True),
    "gru": RecurrentAttention(),
    "deterministic-factor": DeterministicAttention(**_DECODED, query_projection=True),
    "deterministic-matrix": DeterministicAttention(**_DECODED, form="matrix", decoder_input="states_items"),
    "hybrid-variational": HybridAttention(generator=VariationalAttention(**_SMALL, inference="sample")),
    "hybrid-mc": HybridAttention(generator=VariationalAttention(**_SMALL, inference="mc", mc_samples=3)),
    "hybrid-matrix": HybridAttention(
        generator=DiffusionAttention(**_SMALL, form="matrix", diffusion_steps=4, sampling_steps=2)
    ),
    "hybrid-diffusion": HybridAttention(generator=DiffusionAttention(**_SMALL, diffusion_steps=4, sampling_steps=2)),
}
GENERATIVE = [name for name in ATTENTIONS if re.match("variational|diffusion|hybrid", name)]
RANDOM = [*GENERATIVE, "noisy_dot_product"]


def backbone(
    name: str, heads: int = 1, blocks: int = 2, dropout: float = 0.3, share_map: bool = False, **changes: object
) -> Backbone:
    """A small backbone with weights that depend on nothing but its shape; `changes` are fields of its attention."""
    model = ModelConfig(
        hidden_size=WIDTH,
        num_heads=heads,
        num_blocks=blocks,
        dropout=dropout,
        attention=ATTENTIONS[name].model_copy(update=changes),
        share_map=share_map,
    )
    with torch.random.fork_rng():
        torch.manual_seed(1)
        result = Backbone(model, MAX_LEN)
        for parameter in result.parameters():  # Zero biases would hide what they do.
            torch.nn.init.normal_(parameter.data, std=0.3) if parameter.ndim < 2 else None
    return result


def context(
    lengths: tuple[int, ...] = LENGTHS,
    windows: tuple[int, ...] | None = None,
    width: int | None = None,
    step: int = 0,
    num_tokens: int | None = None,
    total: Callable[[Tensor], Tensor] = identity,
) -> Context:
    """A batch of sequences; `windows` are the ids that their noise hangs on."""
    layout = Jagged.of(torch.tensor(lengths), width or max(lengths), sum(lengths))
    ids = torch.arange(len(lengths)) if windows is None else torch.tensor(windows)
    noise = NoiseKey.make(7, step, ids, layout.row_N, layout.position_N)
    return Context(layout, noise, num_tokens=torch.tensor(float(num_tokens or sum(lengths))), total=total)


def rows(lengths: tuple[int, ...] = LENGTHS, seed: int = 0) -> list[Tensor]:
    """Item rows of each sequence: [length, d]."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(length, WIDTH, generator=generator) for length in lengths]


class Parts:
    """Sums over the parts of a batch, each part in its own thread: what an all-reduce does between processes."""

    def __init__(self, count: int) -> None:
        self.slots: list[Tensor | None] = [None] * count
        self.barrier = threading.Barrier(count, timeout=30)

    def total(self, part: int) -> Callable[[Tensor], Tensor]:
        def add(x: Tensor) -> Tensor:
            self.slots[part] = x
            self.barrier.wait()
            result = torch.stack([slot for slot in self.slots if slot is not None]).sum(0)
            self.barrier.wait()
            return result

        return add
