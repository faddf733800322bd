"""Attention is what its formula says, and its map says what it did."""

from dataclasses import replace

import pytest
import torch

from genatt_dist.attention.attend import attend, attention_map, last_rows
from genatt_dist.attention.base import Generated, Logits

KINDS = ["factors", "factors+bias", "offsets", "bias", "table", "factors+offsets", "factors+bias+offsets"]


def logits_of(kind, tokens, width, heads=2):
    parts = kind.split("+")
    shapes = {"bias": (heads, 1, width), "table": (heads, width, width)}
    bias = [torch.randn(shape) for part, shape in shapes.items() if part in parts]
    return Logits(
        query_MHR=torch.randn(tokens, heads, 3) if "factors" in parts else None,
        key_NHR=torch.randn(tokens, heads, 3) if "factors" in parts else None,
        bias_HIK=bias[0] if bias else None,
        offset_MHK=torch.randn(tokens, heads, width) if "offsets" in parts else None,
    )


def one_row(logits, head, start, i):
    """Row i of A by the definition: softmax over j ≤ i of G_ij."""
    g = torch.zeros(i + 1)
    if logits.query_MHR is not None:
        g = g + logits.key_NHR[start : start + i + 1, head] @ logits.query_MHR[start + i, head]
    if logits.bias_HIK is not None:
        row = logits.bias_HIK[head, i if logits.bias_HIK.shape[1] > 1 else 0]
        g = g + torch.stack([row[i - j] for j in range(i + 1)])
    if logits.offset_MHK is not None:
        g = g + torch.stack([logits.offset_MHK[start + i, head, i - j] for j in range(i + 1)])
    return torch.softmax(g, dim=0)


@pytest.mark.parametrize("kind", KINDS)
def test_map_is_the_causal_softmax_of_the_logits(kind, make_context):
    layout = make_context(4, 1, 6, width=7).layout
    logits = logits_of(kind, 11, 7)
    a = attention_map(Generated((logits,), torch.empty(0), torch.zeros(())), layout)
    expected = torch.zeros_like(a)
    for row, (start, length) in enumerate([(0, 4), (4, 1), (5, 6)]):
        for head in range(2):
            for i in range(length):
                expected[row, head, i, : i + 1] = one_row(logits, head, start, i)
    torch.testing.assert_close(a, expected)
    assert torch.equal(a == 0, expected == 0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("samples", [1, 3])
def test_attend_and_attention_map_agree(kind, samples, make_context):
    layout = make_context(4, 1, 6, width=7).layout
    value = torch.randn(11, 2, 5)
    generated = Generated(tuple(logits_of(kind, 11, 7) for _ in range(samples)), value, torch.zeros(()))
    a = attention_map(generated, layout)
    expected = layout.unpad((a @ layout.pad(value).transpose(1, 2)).transpose(1, 2)).flatten(1)
    torch.testing.assert_close(attend(generated, layout), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("samples", [1, 3])
def test_last_rows_alone_are_the_last_of_all_rows(kind, samples, make_context):
    layout = make_context(4, 1, 6, width=7).layout
    first = logits_of(kind, 11, 7)
    others = [logits_of(kind, 11, 7) for _ in range(samples - 1)]  # samples share keys and bias
    logits = [first, *(replace(one, key_NHR=first.key_NHR, bias_HIK=first.bias_HIK) for one in others)]
    generated = Generated(tuple(logits), torch.randn(11, 2, 5), torch.zeros(()))
    expected = attend(generated, layout)[layout.last_B]
    torch.testing.assert_close(attend(last_rows(generated, layout), layout), expected)


def test_without_a_map_the_values_pass():
    value = torch.randn(3, 2, 5)
    assert torch.equal(attend(Generated((), value, torch.zeros(())), None), value.flatten(1))
