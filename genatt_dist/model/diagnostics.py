"""What the failure signs of MATH §8 are computed from, as (sum, count) pairs that parts of a batch may add up.

Legend: B sequences, n width of the batch, N real tokens, D hidden width d, Z latent width d_z, H heads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from genatt_dist.attention.attend import attention_map
from genatt_dist.attention.noise import NoiseKey, derive
from genatt_dist.model.backbone import Backbone, Output
from genatt_dist.model.context import Context

ACTIVE = 0.01  # nat: a latent dimension whose mean KL is above it is in use (Burda et al. 2016).

Statistics = dict[str, tuple[Tensor, Tensor]]


@torch.no_grad()
def statistics(backbone: Backbone, rows_ND: Tensor, context: Context) -> Statistics:
    """Sums and counts named `{name}/block{l}`, from sampled maps in evaluation mode (the module's mode is restored).

    attention_entropy: entropy of a row of A over log(i + 1), rows i ≥ 1: 1 is uniform.
    And for generated attention: kappa (mean over heads), kl_mean (a vector, one a latent dimension), active_units (of
    the global batch: `context.total` is called), total_variation (between the maps of two samples, rows i ≥ 1) and, for
    diffusion, residual_scale (ς).
    """
    generated = backbone.encoder is not None
    training = backbone.training
    backbone.eval()
    try:
        first = backbone(rows_ND, context, sample=True)
        second = backbone(rows_ND, _resampled(context), sample=True) if generated else first
    finally:
        backbone.train(training)
    result: Statistics = {}
    for index in range(len(backbone.blocks)):
        block = _entropy(first, index, context)
        if generated:
            block |= _variation(first, second, index, context) | _latent(first, index, context)
        result |= {f"{name}/block{index}": pair for name, pair in block.items()}
    return result


def _resampled(context: Context) -> Context:
    """The same rows with other noise."""
    noise = context.noise_for("comparing two samples")
    token_N, sequence_B = derive(noise.token_N, 1), derive(noise.sequence_B, 1)
    assert isinstance(token_N, Tensor)
    assert isinstance(sequence_B, Tensor)
    return Context(context.layout, NoiseKey(token_N, sequence_B), num_tokens=context.num_tokens, total=context.total)


def _rows(a_BHnn: Tensor, context: Context) -> Tensor:
    """The rows of a map that have a choice, i ≥ 1: [M, H, n]"""
    return context.layout.unpad(a_BHnn.transpose(1, 2))[context.layout.position_N > 0].float()


def _entropy(output: Output, index: int, context: Context) -> Statistics:
    a_MHn = _rows(attention_map(output.maps[index], context.layout), context)
    position_M = context.layout.position_N[context.layout.position_N > 0]
    entropy_MH = torch.special.entr(a_MHn).sum(-1) / torch.log1p(position_M.float())[:, None]
    return {"attention_entropy": _pair(entropy_MH)}


def _variation(first: Output, second: Output, index: int, context: Context) -> Statistics:
    a_MHn, b_MHn = (_rows(attention_map(output.maps[index], context.layout), context) for output in (first, second))
    return {"total_variation": _pair(0.5 * (a_MHn - b_MHn).abs().sum(-1))}


def _latent(output: Output, index: int, context: Context) -> Statistics:
    values = output.maps[index].statistics
    kl_Z, one = values["kl_Z"], torch.ones_like(context.num_tokens)
    active = (context.total(kl_Z) / context.num_tokens > ACTIVE).sum()
    result = {"kl_mean": (kl_Z, one * context.layout.row_N.shape[0]), "active_units": (active.float(), one)}
    result |= {"kappa": (values["kappa"].float().mean(), one)}
    return result | ({"residual_scale": (values["residual_scale"], one)} if "residual_scale" in values else {})


def _pair(values: Tensor) -> tuple[Tensor, Tensor]:
    return values.sum(), torch.full_like(values.sum(), values.numel())
