"""The GPU computes what the CPU computes. Skipped where there is none."""

import copy

import pytest
import torch

from genatt_dist.attention.noise import NoiseKey, Purpose, keep_mask, normal
from genatt_dist.config import ModelConfig
from genatt_dist.loss.full import full_loss
from genatt_dist.model.backbone import Backbone
from genatt_dist.model.context import Context
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


def test_keyed_noise_is_the_same() -> None:
    cpu, gpu = (_context(device).noise for device in ("cpu", "cuda"))
    assert cpu is not None
    assert gpu is not None
    keys = [noise.token(Purpose.LATENT, 0) for noise in (cpu, gpu)]
    assert torch.equal(keys[0], keys[1].cpu())
    assert torch.equal(keep_mask(keys[0], 33, 0.3), keep_mask(keys[1], 33, 0.3).cpu())
    torch.testing.assert_close(normal(keys[0], 33), normal(keys[1], 33).cpu(), rtol=1e-5, atol=1e-5)


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
