"""From logits to attention: A_ij = softmax over j ≤ i of G_ij, and its mean of the values. Only here is padding seen.

Legend: B sequences, n width of the batch, N real tokens, M rows that are made, H heads, E = d/H, R width of a factor,
K = n offsets, I = 1 or n, S samples.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from genatt_dist.attention.base import Generated, Logits
from genatt_dist.model.jagged import Jagged


def attend(generated: Generated, layout: Jagged) -> Tensor:
    """concat_h(A^h V^h), with A the mean of the generated maps: [N, H·E], or [B, H·E] of the last rows."""
    if not generated.samples:
        return generated.value_NHE.flatten(1)
    value_BHnE = _pad_heads(generated.value_NHE, layout)
    if generated.last:
        return (_last_map(generated, layout) @ value_BHnE).flatten(1)
    outputs = [_attend_one(logits, value_BHnE, layout) for logits in generated.samples]
    mean_BHnE = outputs[0] if len(outputs) == 1 else torch.stack(outputs).mean(0)
    return layout.unpad(mean_BHnE.transpose(1, 2)).flatten(1)


def attention_map(generated: Generated, layout: Jagged) -> Tensor:
    """A itself, by an explicit softmax: [B, H, n, n], zero above the diagonal and at padding rows."""
    maps = [_map(logits, layout) for logits in generated.samples]
    real_Bn = layout.pad(layout.row_N.new_ones(layout.row_N.shape, dtype=torch.bool))
    return torch.stack(maps).mean(0) * real_Bn[:, None, :, None]


def last_rows(generated: Generated, layout: Jagged) -> Generated:
    """The same maps, of each sequence's last row alone."""

    def last(x_NHK: Tensor | None) -> Tensor | None:
        return None if x_NHK is None else x_NHK[layout.last_B]

    samples = tuple(
        replace(logits, query_MHR=last(logits.query_MHR), offset_MHK=last(logits.offset_MHK))
        for logits in generated.samples
    )
    return replace(generated, samples=samples, last=True)


def _attend_one(logits: Logits, value_BHnE: Tensor, layout: Jagged) -> Tensor:
    if logits.query_MHR is None or logits.key_NHR is None:
        return _map(logits, layout) @ value_BHnE
    query_BHnR, key_BHnR = _pad_heads(logits.query_MHR, layout), _pad_heads(logits.key_NHR, layout)
    mask = _mask(logits, layout)
    # Padding needs no mask of its own: it lies to the right of every real row, where causality already hides it.
    return F.scaled_dot_product_attention(
        query_BHnR, key_BHnR, value_BHnE, attn_mask=mask, is_causal=mask is None, scale=1.0
    )


def _map(logits: Logits, layout: Jagged) -> Tensor:
    """Softmax over j ≤ i of G: [B or 1, H, n, n]"""
    if logits.query_MHR is None and logits.bias_HIK is None and logits.offset_MHK is not None:
        return _offset_map(logits.offset_MHK, layout)
    g = _mask(logits, layout)
    if g is None:
        g = torch.zeros((), device=layout.position_N.device).masked_fill(_future(layout), -torch.inf)
    if logits.query_MHR is not None and logits.key_NHR is not None:
        g = g + _pad_heads(logits.query_MHR, layout) @ _pad_heads(logits.key_NHR, layout).mT
    return torch.softmax(g, dim=-1)


def _mask(logits: Logits, layout: Jagged) -> Tensor | None:
    """What is added to query · key: b_{i−j} + o_{i,i−j} for j ≤ i, −∞ elsewhere, [B or 1, H, n, n]; None: nothing."""
    parts = []
    if logits.bias_HIK is not None:
        parts.append(_columns(logits.bias_HIK.expand(-1, layout.width, -1))[None])
    if logits.offset_MHK is not None:
        parts.append(_columns(_pad_heads(logits.offset_MHK, layout)))
    return sum(parts[1:], parts[0]).masked_fill(_future(layout), -torch.inf) if parts else None


def _offset_map(offset_NHK: Tensor, layout: Jagged) -> Tensor:
    """Softmax over the offsets each real row has, then "k steps back" → column i − k: [N, H, K] → [B, H, n, n]."""
    valid_N1K = torch.arange(layout.width, device=layout.position_N.device) <= layout.position_N[:, None, None]
    p_NHK = torch.softmax(offset_NHK.masked_fill(~valid_N1K, -torch.inf), dim=-1)
    return _columns(_pad_heads(p_NHK, layout))


def _columns(p_BHnK: Tensor) -> Tensor:
    """a_ij = p_{i,i−j} for j ≤ i; what stands at j > i has no meaning, and is 0 where p is 0 beyond each row's start.

    The skew of Music Transformer (Huang et al. 2018): with offsets reversed, one zero column makes a plain reshape move
    row i by i − (n − 1) columns. Unlike a gather, its backward is no scatter. What wraps around to j > i are offsets
    beyond the start of row i + 1.
    """
    n = p_BHnK.shape[-1]
    padded = F.pad(p_BHnK.flip(-1), (1, 0))
    return padded.flatten(-2).unflatten(-1, (n + 1, n))[..., 1:, :]


def _last_map(generated: Generated, layout: Jagged) -> Tensor:
    """The last row of each sequence's map: [B, H, 1, n]"""
    first, position_B1 = generated.samples[0], layout.lengths_B[:, None] - 1
    back_Bn = position_B1 - torch.arange(layout.width, device=position_B1.device)
    steps_Bn = back_Bn.clamp(min=0)
    g_SBHn: Tensor = torch.zeros((), device=position_B1.device)
    if first.query_MHR is not None and first.key_NHR is not None:
        query_BHSR = torch.stack([logits.query_MHR for logits in generated.samples if logits.query_MHR is not None], 2)
        g_SBHn = (query_BHSR @ _pad_heads(first.key_NHR, layout).mT).permute(2, 0, 1, 3)
    if first.bias_HIK is not None:
        row_B1 = position_B1 if first.bias_HIK.shape[1] > 1 else torch.zeros_like(position_B1)
        g_SBHn = g_SBHn + first.bias_HIK[:, row_B1, steps_Bn].transpose(0, 1)[None]
    if first.offset_MHK is not None:
        offset_SBHK = torch.stack([logits.offset_MHK for logits in generated.samples if logits.offset_MHK is not None])
        g_SBHn = g_SBHn + offset_SBHK.gather(-1, steps_Bn[None, :, None, :].expand(*offset_SBHK.shape[:3], -1))
    a_SBHn = torch.softmax(g_SBHn.masked_fill((back_Bn < 0)[:, None], -torch.inf), dim=-1)
    return a_SBHn.mean(0).unsqueeze(-2)


def _future(layout: Jagged) -> Tensor:
    """True where column j lies after row i: [n, n]."""
    index_n = torch.arange(layout.width, device=layout.position_N.device)
    return index_n > index_n[:, None]


def _pad_heads(x_NHE: Tensor, layout: Jagged) -> Tensor:
    """[N, H, E] → [B, H, n, E]"""
    return layout.pad(x_NHE).transpose(1, 2)
