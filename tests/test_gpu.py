"""The GPU computes what the CPU computes. Skipped where there is none."""

import copy

import pytest
import torch

from genatt_dist.attention.noise import NoiseKey, bits, derive, integers, keep_mask, normal, uniform
from genatt_dist.config import ModelConfig
from genatt_dist.loss.full import full_loss
from genatt_dist.model.backbone import Backbone
from genatt_dist.model.context import Context
from genatt_dist.model.dropout import dropout
from genatt_dist.model.jagged import Jagged

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
LENGTHS = torch.tensor([7, 3, 8, 1])


def _context(device: str) -> Context:
    layout = Jagged.of(LENGTHS.to(device), 8, int(LENGTHS.sum()))
    windows = torch.arange(len(LENGTHS), device=device)
    return Context.whole(layout, NoiseKey.make(0, 1, windows, layout.row_N, layout.position_N))


def test_every_draw_and_dropout_are_the_same() -> None:
    results = []
    for device in ("cpu", "cuda"):
        key_N = derive(7, torch.arange(3000, device=device))
        assert isinstance(key_N, torch.Tensor)
        key_NH = derive(key_N[:, None], torch.arange(2, device=device))
        assert isinstance(key_NH, torch.Tensor)
        # Made on the CPU for both: only what the draws do may differ.
        x_ND = torch.linspace(-3, 3, 3000 * 64).view(3000, 64).to(device).requires_grad_()
        dropped_ND = dropout(x_ND, 0.3, key_N)
        dropped_ND.backward(x_ND.detach())
        assert x_ND.grad is not None
        exact = [key_NH, bits(key_NH, 9), uniform(key_NH, 9), integers(key_NH, 9, 1000), keep_mask(key_N, 64, 0.3)]
        rounded = [normal(key_NH, 33), dropped_ND.detach(), x_ND.grad]
        results.append(([part.cpu() for part in exact], [part.cpu() for part in rounded]))
    (exact, rounded), (gpu_exact, gpu_rounded) = results
    for left, right in zip(exact, gpu_exact, strict=True):
        assert torch.equal(left, right)
    for left, right in zip(rounded, gpu_rounded, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("attention", ["dot_product", "variational", "diffusion"])
def test_states_loss_and_gradients_are_the_same(attention: str) -> None:
    torch.backends.cudnn.allow_tf32 = False
    torch.manual_seed(0)
    on_cpu = Backbone(ModelConfig(hidden_size=16, dropout=0.2, attention={"type": attention}), 8)  # type: ignore[arg-type]
    on_gpu = copy.deepcopy(on_cpu).cuda()
    rows, items = torch.randn(int(LENGTHS.sum()), 16), torch.randn(50, 16)
    targets, weight = torch.arange(len(rows)), torch.ones(len(rows))
    results = []
    for model, device in ((on_cpu, "cpu"), (on_gpu, "cuda")):
        output = model(rows.to(device), _context(device))
        loss = full_loss(output.states_ND, items.to(device), targets.to(device), weight.to(device), 5)
        (loss + output.generative_loss).backward()
        results.append((output.states_ND, loss, [p.grad for p in model.parameters() if p.grad is not None]))
    (states, loss, gradients), (gpu_states, gpu_loss, gpu_gradients) = results
    torch.testing.assert_close(states, gpu_states.cpu(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(loss, gpu_loss.cpu(), rtol=1e-4, atol=1e-4)
    for left, right in zip(gradients, gpu_gradients, strict=True):
        torch.testing.assert_close(left, right.cpu(), rtol=1e-3, atol=1e-3)
