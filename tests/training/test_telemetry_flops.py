"""Operations of matrix products are counted by their formulas, hand-written gradients included, and change nothing."""

import pytest
import torch
from torch.nn import functional as F

from genatt_dist.loss.full import full_loss
from genatt_dist.model.recurrence import gru
from genatt_dist.training import flops
from genatt_dist.training.flops import counted, matmul_peak

N, D, V, B, H, L, E = 12, 8, 30, 2, 3, 5, 4


def test_a_linear_layer_is_three_products() -> None:
    layer, x_ND = torch.nn.Linear(D, V), torch.randn(N, D, requires_grad=True)
    with counted() as count:
        layer(x_ND).sum().backward()
    assert count.flops == 3 * 2 * N * D * V


@pytest.mark.parametrize("chunk", [N, 5])
def test_the_full_softmax_is_three_products_whatever_its_chunks(chunk: int) -> None:
    """Scores, gradients of states and of rows; the last one is added in place."""
    torch.manual_seed(0)
    states_ND, items_VD = torch.randn(N, D, requires_grad=True), torch.randn(V, D, requires_grad=True)
    targets_N, weight_N = torch.randint(V - 1, (N,)), torch.ones(N)
    with counted() as count:
        full_loss(states_ND, items_VD, targets_N, weight_N, chunk, 1).backward()
    assert count.flops == 3 * 2 * N * D * (V - 1)


def test_the_recurrence_is_its_products_forward_and_twice_backward() -> None:
    lengths = (5, 4, 2, 1)
    active = [sum(length > place for length in lengths) for place in range(max(lengths))]
    weights = [torch.randn(3 * D, D, requires_grad=True) for _ in range(2)]
    biases = [torch.randn(3 * D, requires_grad=True) for _ in range(2)]
    x_ND, tokens = torch.randn(sum(lengths), D, requires_grad=True), sum(lengths)
    with counted() as count:
        states_ND = gru(x_ND, *weights, *biases, active)
    assert count.flops == 2 * 2 * tokens * D * 3 * D  # of inputs and of states, the first of which is zero
    with counted() as count:
        states_ND.sum().backward()
    carried = 2 * (tokens - active[0]) * D * 3 * D  # a sequence's first state has none before it
    assert count.flops == 3 * 2 * tokens * D * 3 * D + carried


@pytest.mark.parametrize("masked", [False, True])
def test_fused_attention_counts_as_its_products(masked: bool) -> None:
    """Two products forward; backward four, and the scores once more, which the kernel does not keep."""
    query, key, value = (torch.randn(B, H, L, E, requires_grad=True) for _ in range(3))
    mask = torch.randn(B, H, L, L) if masked else None
    one = 2 * B * H * L * L * E
    with counted() as count:
        output = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=not masked)
    assert count.flops == 2 * one
    with counted() as count:
        output.sum().backward()
    assert count.flops == 5 * one


def test_cudnn_is_counted_by_shapes() -> None:
    x, weights = (B, L, D), [(3 * E, D), (3 * E, E), (3 * E,), (3 * E,)]
    assert flops._rnn(x, weights, 4, None) == 2 * B * L * 3 * E * (D + E)
    assert flops._rnn_backward(x, weights, 4, None) == 2 * flops._rnn(x, weights, 4, None)


def test_the_peak_is_a_number_of_this_machine() -> None:
    assert 1e8 < matmul_peak(torch.device("cpu"), torch.float32) < 1e14
