"""Attention is what its formula says, and its map says what it did."""

import pytest
import torch

from genatt_dist.attention.attend import attend, attention_map
from genatt_dist.attention.base import Factors, Generated, OffsetLogits
from genatt_dist.attention.logits import RelativeBias


def logits_of(kind, tokens, width, heads=2):
    if kind == "offsets":
        return OffsetLogits(torch.randn(tokens, heads, width))
    bias = RelativeBias(heads, 9)
    torch.nn.init.normal_(bias.bias)
    return Factors(
        torch.randn(tokens, heads, 3), torch.randn(tokens, heads, 3), bias(width) if kind == "bias" else None
    )


def one_row(kind, logits, head, start, i):
    """Row i of A by the definition: softmax over j ≤ i of G_ij."""
    if kind == "offsets":
        g = torch.stack([logits.logits_NHK[start + i, head, i - j] for j in range(i + 1)])
    else:
        g = logits.key_NHR[start : start + i + 1, head] @ logits.query_NHR[start + i, head]
        if kind == "bias":
            g = g + torch.stack([logits.bias_Hnn[head, i, j] for j in range(i + 1)])
    return torch.softmax(g, dim=0)


@pytest.mark.parametrize("kind", ["plain", "bias", "offsets"])
def test_map_is_the_causal_softmax_of_the_logits(kind, make_context):
    layout = make_context(4, 1, 6, width=7).layout
    logits = logits_of(kind, 11, 7)
    a = attention_map(Generated((logits,), torch.empty(0), torch.zeros(())), layout)
    expected = torch.zeros_like(a)
    for row, (start, length) in enumerate([(0, 4), (4, 1), (5, 6)]):
        for head in range(2):
            for i in range(length):
                expected[row, head, i, : i + 1] = one_row(kind, logits, head, start, i)
    torch.testing.assert_close(a, expected)
    assert torch.equal(a == 0, expected == 0)


@pytest.mark.parametrize("kind", ["plain", "bias", "offsets"])
@pytest.mark.parametrize("samples", [1, 3])
def test_attend_and_attention_map_agree(kind, samples, make_context):
    layout = make_context(4, 1, 6, width=7).layout
    value = torch.randn(11, 2, 5)
    generated = Generated(tuple(logits_of(kind, 11, 7) for _ in range(samples)), value, torch.zeros(()))
    a = attention_map(generated, layout)
    expected = layout.unpad((a @ layout.pad(value).transpose(1, 2)).transpose(1, 2)).flatten(1)
    torch.testing.assert_close(attend(generated, value, layout), expected)


def test_relative_bias_depends_on_the_distance_alone():
    bias = RelativeBias(1, 6)
    bias.bias.data = torch.arange(6.0)[None]
    below = bias(4)[0].tril()
    assert below.tolist() == [[0, 0, 0, 0], [1, 0, 0, 0], [2, 1, 0, 0], [3, 2, 1, 0]]
