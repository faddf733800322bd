"""The CPU's GRU is torch's, in values and in gradients, whatever the lengths."""

import pytest
import torch

from genatt_dist.model.encoder import Encoder
from genatt_dist.model.jagged import Jagged
from genatt_dist.model.recurrence import gru

LENGTHS = {"mixed": [5, 1, 7, 3, 7, 2], "equal": [4, 4, 4], "one": [6], "single tokens": [1, 1, 1], "rising": [1, 2, 3]}


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_states_and_gradients_are_those_of_torchs_gru(lengths: list[int]) -> None:
    torch.manual_seed(0)
    layout = Jagged.of(torch.tensor(lengths), max(lengths) + 1, sum(lengths))
    encoder = Encoder(6).double()
    results = []
    for states in (
        lambda x: encoder(x, layout),
        lambda x: layout.unpad(torch.nn.GRU.forward(encoder, layout.pad(x))[0]),
    ):
        x = torch.randn(sum(lengths), 6, dtype=torch.double, generator=torch.Generator().manual_seed(1))
        s = states(x.requires_grad_())
        encoder.zero_grad()
        s.cumsum(-1).square().sum().backward()
        results.append([s.detach(), x.grad, *(p.grad.clone() for p in encoder.parameters())])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-12)


def test_gradients_are_those_of_finite_differences() -> None:
    torch.manual_seed(0)
    shapes = [(9, 3), (9, 3), (9, 3), (9,), (9,)]
    x, *weights = (torch.randn(shape, dtype=torch.double, requires_grad=True) for shape in shapes)
    assert torch.autograd.gradcheck(lambda *inputs: gru(*inputs, [4, 3, 2]), (x, *weights))


def test_without_gradients_the_states_are_the_same() -> None:
    encoder, layout = Encoder(5), Jagged.of(torch.tensor([3, 1]), 3, 4)
    x = torch.randn(4, 5)
    with torch.no_grad():
        plain = encoder(x, layout)
    assert torch.equal(plain, encoder(x, layout))
