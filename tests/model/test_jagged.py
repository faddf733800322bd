"""Real tokens first, sequence after sequence; padding is zeros."""

import torch

from genatt_dist.model.jagged import Jagged


def test_pad_and_unpad_are_inverse():
    layout = Jagged.of(torch.tensor([2, 1, 3]), 4, 6)
    x = torch.randn(6, 2, 5)
    padded = layout.pad(x)
    assert padded.shape == (3, 4, 2, 5)
    assert torch.equal(layout.unpad(padded), x)
    assert padded.count_nonzero() == x.count_nonzero()
    assert layout.position_N.tolist() == [0, 1, 0, 0, 1, 2]
    assert layout.row_N.tolist() == [0, 0, 1, 2, 2, 2]
    assert layout.last_B.tolist() == [1, 2, 5]


def test_gradient_of_pad_is_unpad():
    layout = Jagged.of(torch.tensor([2, 1]), 3, 3)
    x = torch.randn(3, 4, requires_grad=True)
    weight = torch.randn(2, 3, 4)
    (layout.pad(x) * weight).sum().backward()
    assert torch.equal(x.grad, layout.unpad(weight))
