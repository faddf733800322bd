"""What the failure signs of MATH §8 are computed from, as (sum, count) pairs that parts of a batch may add up.

Legend: B sequences, n width of the batch, P = max_len, N real tokens, M those with a choice (rows i ≥ 1), D hidden
width d, Z latent width d_z, H heads. a and b are maps of the same rows from two samples.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from genatt_dist.attention.attend import attention_map
from genatt_dist.attention.base import Generated
from genatt_dist.attention.denoiser import Times
from genatt_dist.attention.noise import NoiseKey, derive
from genatt_dist.model.backbone import Backbone
from genatt_dist.model.context import Context
from genatt_dist.model.jagged import Jagged

ACTIVE = 0.01  # nat: a latent dimension whose mean KL is above it is in use (Burda et al. 2016).
ROUNDING = 1e-6  # total variation that two passes over one deterministic map may show.

Statistics = dict[str, tuple[Tensor, Tensor]]


@torch.no_grad()
def statistics(backbone: Backbone, rows_ND: Tensor, context: Context) -> Statistics:
    """Sums and counts named `{name}/block{l}`, from sampled maps in evaluation mode (the module's mode is restored).

    Of every block that has a map of its own (a map shared by all blocks is told once, as block 0's; a block without
    attention is passed over):

    attention_entropy: entropy of a row of A over log(i + 1), rows i ≥ 1: 1 is uniform.

    And where the attention has them:

    total_variation: ½ Σ_j |a_ij − b_ij| between the maps of two samples, rows i ≥ 1.
    between_users: share of a map's variance that lies between users (`between_users`).
    kl_mean: a vector, KL of each latent dimension in nat. active_units: how many of them are above ACTIVE.
    kappa, alpha: vectors, one number a head. residual_scale: ς. alpha_bar_T: ᾱ_T of the schedule.

    What only rows i ≥ 1 tell is left out where the global batch has none. active_units and between_users are numbers of
    the global batch: `context.total` is called, so every part must call
    this function once. Their sums hold the number itself, their counts 1.
    """
    training = backbone.training
    backbone.eval()
    try:
        first = backbone(rows_ND, context, sample=True)
        second = backbone(rows_ND, resampled(context, 1), sample=True)
    finally:
        backbone.train(training)
    result: Statistics = {}
    for index in own_maps(first.maps):
        one = first.maps[index]
        a_BHnn, b_BHnn = (attention_map(output.maps[index], context.layout).float() for output in (first, second))
        block = _generator(one, context) | _schedule(backbone, one)
        variation = _variation(a_BHnn, b_BHnn, context.layout)
        # Asked of all parts together, so that each has the same names. Histories of one item each have no row with a
        # choice, and a mean over none is no number.
        moved, counted = context.total(torch.stack(variation))
        if counted:
            block = _entropy(a_BHnn, context.layout) | block
            # A deterministic attention has no such numbers, a generator that became deterministic has, and they are
            # its failure sign.
            if moved > ROUNDING * counted or "kl_Z" in one.statistics:
                block["total_variation"] = variation
                block["between_users"] = between_users(a_BHnn, b_BHnn, context, backbone.max_len)
        result |= {f"{name}/block{index}": pair for name, pair in block.items()}
    return result


def resampled(context: Context, number: int) -> Context:
    """The same rows with other noise, another one for each `number` ≥ 1."""
    noise = context.noise_for("comparing samples")
    token_N, sequence_B = derive(noise.token_N, number), derive(noise.sequence_B, number)
    assert isinstance(token_N, Tensor)
    assert isinstance(sequence_B, Tensor)
    return replace(context, noise=NoiseKey(token_N, sequence_B))


def own_maps(maps: tuple[Generated, ...]) -> list[int]:
    """Blocks with a map of their own: not those without attention, nor those that use an earlier block's."""
    drawn = [generated.samples[0] if generated.samples else None for generated in maps]
    return [
        index
        for index, logits in enumerate(drawn)
        if logits is not None and not any(logits is earlier for earlier in drawn[:index])
    ]


def relative_entropy(a_BHnn: Tensor, layout: Jagged) -> Tensor:
    """Entropy of each row i ≥ 1 of A over log(i + 1), the uniform row's: [M, H]"""
    position_M = layout.position_N[layout.position_N > 0]
    return torch.special.entr(_rows(a_BHnn, layout)).sum(-1) / torch.log1p(position_M.float())[:, None]


def total_variation(a_BHnn: Tensor, b_BHnn: Tensor, layout: Jagged) -> Tensor:
    """½ Σ_j |a_ij − b_ij| of each row i ≥ 1: [M, H]"""
    return 0.5 * (_rows(a_BHnn, layout) - _rows(b_BHnn, layout)).abs().sum(-1)


def _rows(a_BHnn: Tensor, layout: Jagged) -> Tensor:
    """The rows of a map that have a choice, i ≥ 1: [M, H, n]"""
    return layout.unpad(a_BHnn.transpose(1, 2))[layout.position_N > 0]


def _entropy(a_BHnn: Tensor, layout: Jagged) -> Statistics:
    return {"attention_entropy": _pair(relative_entropy(a_BHnn, layout))}


def _variation(a_BHnn: Tensor, b_BHnn: Tensor, layout: Jagged) -> tuple[Tensor, Tensor]:
    return _pair(total_variation(a_BHnn, b_BHnn, layout))


def between_users(a_BHnn: Tensor, b_BHnn: Tensor, context: Context, max_len: int) -> tuple[Tensor, Tensor]:
    """The share of Var A_ij that lies between users, 1 − W/T, pooled over heads and places (i ≥ 1, j ≤ i); in [0, 1].

    T is the variance of A_ij over users, W that between samples of one user: with n_i users that reach row i, the
    unbiased (n_i − 1)-weighted estimates from two samples each. That is the intraclass correlation ICC(1) of Shrout &
    Fleiss (1979), estimates below 0 told as 0. Near 0 the map is the same noise for everybody, 1 is no noise.
    """
    lengths_B, missing = context.layout.lengths_B, max_len - context.layout.width
    row_P = torch.arange(max_len, device=lengths_B.device)
    users_P = (lengths_B[:, None] > row_P).sum(0)
    # Parts of a batch differ in width, so all are widened before their moments are added up. Padding rows are 0.
    maps_2BHPP = F.pad(torch.stack((a_BHnn, b_BHnn)).double(), (0, missing, 0, missing))
    within_P = 0.5 * (maps_2BHPP[0] - maps_2BHPP[1]).square().sum((0, 1, 3))
    squares_P = 0.5 * maps_2BHPP.square().sum((0, 1, 2, 4))
    sums_2HPP = maps_2BHPP.sum(1)
    moments = torch.cat((users_P.double(), within_P, squares_P, sums_2HPP.flatten()))
    users_P, within_P, squares_P, sums = context.total(moments).split((max_len, max_len, max_len, sums_2HPP.numel()))
    many_P = (users_P > 1) & (row_P > 0)
    divisor_P = users_P.clamp(min=1)
    mean_squares_P = 0.5 * sums.view_as(sums_2HPP).square().sum((0, 1, 3)) / divisor_P
    between_and_within = (squares_P - mean_squares_P)[many_P].sum()
    within = (within_P * (users_P - 1) / divisor_P)[many_P].sum()
    share = torch.where(between_and_within > 0, 1 - within / between_and_within, 0.0).clamp(0, 1).float()
    return share, torch.ones_like(share)


def _generator(generated: Generated, context: Context) -> Statistics:
    """What the generator itself told: its latent, its scales."""
    values, one = generated.statistics, torch.ones_like(context.num_tokens)
    result: Statistics = {}
    if "kl_Z" in values:
        kl_Z = values["kl_Z"].float()
        active = (context.total(kl_Z) / context.num_tokens > ACTIVE).sum()
        result["kl_mean"] = (kl_Z, one * context.layout.row_N.shape[0])
        result["active_units"] = (active.float(), one)
    for name in ("kappa", "alpha"):
        if name in values:
            result[name] = (values[name].float().flatten(), one)
    if "residual_scale" in values:
        result["residual_scale"] = (values["residual_scale"].float(), one)
    return result


def _schedule(backbone: Backbone, generated: Generated) -> Statistics:
    """ᾱ_T: how much of the clean row is left where sampling starts."""
    times = next((module for module in backbone.modules() if isinstance(module, Times)), None)
    if times is None or "residual_scale" not in generated.statistics:
        return {}
    last = times.alpha_bar_T[-1].float()
    return {"alpha_bar_T": (last, torch.ones_like(last))}


def _pair(values: Tensor) -> tuple[Tensor, Tensor]:
    return values.sum(), torch.full_like(values.sum(), values.numel())
