"""From logits to attention: A_ij = softmax over j ≤ i of G_ij, and its mean of the values. Only here is padding seen.

Legend: B sequences, n width of the batch, N real tokens, H heads, E = d/H, R width of a factor, K = n offsets.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from genatt_dist.attention.base import Factors, Generated, Logits, OffsetLogits
from genatt_dist.model.jagged import Jagged


def attend(generated: Generated, value_NHE: Tensor, layout: Jagged) -> Tensor:
    """concat_h(A^h V^h), with A the mean of the generated maps: value [N, H, E] → [N, H·E]."""
    value_BHnE = _pad_heads(value_NHE, layout)
    outputs = [_attend_one(logits, value_BHnE, layout) for logits in generated.samples]
    mean_BHnE = outputs[0] if len(outputs) == 1 else torch.stack(outputs).mean(0)
    return layout.unpad(mean_BHnE.transpose(1, 2)).flatten(1)


def attention_map(generated: Generated, layout: Jagged) -> Tensor:
    """A itself, by an explicit softmax: [B, H, n, n], zero above the diagonal and at padding rows."""
    maps = [_map(logits, layout) for logits in generated.samples]
    real_Bn = layout.pad(layout.row_N.new_ones(layout.row_N.shape, dtype=torch.bool))
    return torch.stack(maps).mean(0) * real_Bn[:, None, :, None]


def _attend_one(logits: Logits, value_BHnE: Tensor, layout: Jagged) -> Tensor:
    if isinstance(logits, OffsetLogits):
        return _offset_map(logits, layout) @ value_BHnE
    query_BHnR, key_BHnR = _pad_heads(logits.query_NHR, layout), _pad_heads(logits.key_NHR, layout)
    if logits.bias_Hnn is None:
        return F.scaled_dot_product_attention(query_BHnR, key_BHnR, value_BHnE, is_causal=True, scale=1.0)
    # Padding needs no mask of its own: it lies to the right of every real row, where causality already hides it.
    mask_Hnn = logits.bias_Hnn.masked_fill(_future(layout), -torch.inf)
    return F.scaled_dot_product_attention(query_BHnR, key_BHnR, value_BHnE, attn_mask=mask_Hnn, scale=1.0)


def _map(logits: Logits, layout: Jagged) -> Tensor:
    if isinstance(logits, OffsetLogits):
        return _offset_map(logits, layout)
    return torch.softmax(_factor_logits(logits, layout).masked_fill(_future(layout), -torch.inf), dim=-1)


def _factor_logits(logits: Factors, layout: Jagged) -> Tensor:
    """G_ij = query_i · key_j + b_{i−j}: [B, H, n, n]"""
    g_BHnn = _pad_heads(logits.query_NHR, layout) @ _pad_heads(logits.key_NHR, layout).mT
    return g_BHnn if logits.bias_Hnn is None else g_BHnn + logits.bias_Hnn


def _offset_map(logits: OffsetLogits, layout: Jagged) -> Tensor:
    """Softmax over the offsets each real row has, then "k steps back" → column i − k: [N, H, K] → [B, H, n, n]."""
    valid_N1K = torch.arange(layout.width, device=layout.position_N.device) <= layout.position_N[:, None, None]
    p_NHK = torch.softmax(logits.logits_NHK.masked_fill(~valid_N1K, -torch.inf), dim=-1)
    return _columns(_pad_heads(p_NHK, layout))


def _columns(p_BHnK: Tensor) -> Tensor:
    """a_ij = p_{i,i−j} for j ≤ i, else 0.

    The skew of Music Transformer (Huang et al. 2018): with offsets reversed, one zero column makes a plain reshape move
    row i by i − (n − 1) columns. Unlike a gather, its backward is no scatter. What wraps around to j > i are offsets
    beyond the start of row i + 1, whose p is 0.
    """
    n = p_BHnK.shape[-1]
    padded = F.pad(p_BHnK.flip(-1), (1, 0))
    return padded.flatten(-2).unflatten(-1, (n + 1, n))[..., 1:, :]


def _future(layout: Jagged) -> Tensor:
    """True where column j lies after row i: [n, n]."""
    index_n = torch.arange(layout.width, device=layout.position_N.device)
    return index_n > index_n[:, None]


def _pad_heads(x_NHE: Tensor, layout: Jagged) -> Tensor:
    """[N, H, E] → [B, H, n, E]"""
    return layout.pad(x_NHE).transpose(1, 2)
