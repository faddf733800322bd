"""What both generative attentions share: KL with free bits, rms, and rows that have exactly the entries they should."""

import pytest
import torch

from genatt_dist.attention.base import Rows
from genatt_dist.attention.decoder import Latent, Posterior, free_bits
from genatt_dist.attention.entries import Entries, ToEntries


def test_kl_is_that_of_two_gaussians():
    mu, log_var = torch.randn(7, 3), torch.randn(7, 3)
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(mu, (log_var / 2).exp()), normal(0.0, 1.0))
    torch.testing.assert_close(Posterior(mu, log_var).kl_Z(), expected.sum(0))


def test_samples_have_the_posteriors_mean_and_variance():
    mu, log_var = torch.tensor([1.0, -2.0]).expand(20_000, 2), torch.tensor([0.5, -1.0]).expand(20_000, 2)
    z = Posterior(mu, log_var).sample(torch.randn(20_000, 2))
    torch.testing.assert_close(z.mean(0), mu[0], atol=0.03, rtol=0)
    torch.testing.assert_close(z.var(0), log_var[0].exp(), atol=0, rtol=0.04)


def test_log_variance_is_clipped():
    latent = Latent(4, 2)
    log_var = latent(100 * torch.randn(50, 4)).log_var_MZ
    assert log_var.min() == -8
    assert log_var.max() == 4


@pytest.mark.parametrize("floor", [0.0, 0.5, 10.0])
def test_free_bits_value_and_gradient(floor, make_context):
    """(1/d_z) Σ_j max(λ, mean_i KL_ij): dimensions above λ push, the others do not."""
    context = make_context(3, 4)
    kl = (torch.rand(7, 5) * torch.tensor([0.1, 0.5, 1.0, 2.0, 4.0])).requires_grad_()
    direct = kl.detach().clone().requires_grad_()
    loss, expected = free_bits(kl.sum(0), floor, context), direct.mean(0).clamp(min=floor).mean()
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(kl.grad, direct.grad)


def test_rms_is_over_valid_entries(make_context):
    every = Rows.of(make_context(3, 1, width=5), last=False)
    for form, sizes in (("matrix", [1, 2, 3, 1]), ("factor", [4] * 4)):
        entries = Entries.of(form, 4, every)
        x = entries.mask(torch.randn(4, 2, entries.width))
        y = entries.rms(x)
        for i, size in enumerate(sizes):
            head = x[i, :, :size]
            expected = head / (head.square().mean(-1, keepdim=True) + 1e-2).sqrt()
            torch.testing.assert_close(y[i, :, :size], expected)
            assert (y[i, :, size:] == 0).all()


def test_noise_of_an_entry_does_not_depend_on_the_width(make_context):
    draws = []
    for width in (3, 6):
        context = make_context(3, 1, width=width)
        entries = Entries.of("matrix", 4, Rows.of(context, last=False))
        draws.append(entries.normal(context.noise.token_N, 2, like=torch.empty(0)))
    assert torch.equal(draws[0], draws[1][..., :3])
    assert (draws[1][..., 3:] == 0).all()
    assert not torch.equal(draws[0][:, 0], draws[0][:, 1])


def test_a_linear_map_uses_the_first_entries_of_each_head():
    to = ToEntries(3, 2, 5)
    x = torch.randn(6, 3)
    torch.testing.assert_close(to(x, 2), to(x, 5)[..., :2])
