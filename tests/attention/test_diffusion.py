"""D-GenAtt: what is diffused, which gradients flow, and that masked entries do not exist."""

import pytest
import torch
from test_noise import ks

from genatt_dist.attention.base import Rows
from genatt_dist.attention.denoiser import MOMENTUM, ResidualScale
from genatt_dist.attention.diffusion import Diffusion
from genatt_dist.attention.entries import Entries
from genatt_dist.attention.noise import NoiseKey, Purpose
from genatt_dist.config import DiffusionAttention, ModelConfig

D, T = 8, 5


def generator(form="factor", heads=2, **changes):
    fields = {"rank": 4, "latent_size": 3, "generator_size": 12, "diffusion_steps": T, "sampling_steps": T}
    fields |= {"diffused_share": 1.0} | changes
    config = DiffusionAttention(form=form, **fields)
    return Diffusion(ModelConfig(hidden_size=D, num_heads=heads, num_blocks=1, attention=config), config, 6, 0)


def inputs(tokens):
    x, s = torch.randn(2, tokens, D).unbind(0)
    return x.requires_grad_(), s.requires_grad_()


def rows_of(generated):
    logits = generated.samples[0]
    return logits.query_MHR * 2 if logits.offset_MHK is None else logits.offset_MHK  # √r/κ = 2


class Spy:
    """Every call of the denoiser: its noised input and its output, whose gradient is kept."""

    def __init__(self, module):
        self.inputs, self.outputs = [], []
        module.denoiser.input.register_forward_hook(self.entering, with_kwargs=True)
        module.denoiser.register_forward_hook(self.leaving)

    def entering(self, _, arguments, named, output):
        if arguments:  # else it makes the part that does not change from step to step
            self.inputs.append(arguments[0].detach())

    def leaving(self, _, arguments, output):
        self.outputs.append(output)
        if output.requires_grad:
            output.retain_grad()


def test_t_is_the_last_step_a_quarter_of_the_time_and_else_uniform(make_context):
    t = generator()._draw_t(make_context(*[1] * 20_000).noise)
    share = torch.bincount(t, minlength=T + 1) / t.numel()
    expected = torch.tensor([0.0] + [0.75 / T] * T)
    expected[T] += 0.25
    assert share.numel() == T + 1
    torch.testing.assert_close(share, expected, atol=0.01, rtol=0)


def test_the_last_diffused_state_is_standard_normal(make_context):
    """With T = 1 every sequence is diffused to ᾱ_T = 4.3e-5, which sampling takes for N(0, I)."""
    module = generator(diffusion_steps=1, sampling_steps=1).train()
    spy = Spy(module)
    module(*inputs(4000), make_context(*[4] * 1000))
    assert ks(spy.inputs[0], torch.special.ndtr) < 1.63


@pytest.mark.parametrize("unrolled", [False, True])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_masked_entries_are_zero_at_every_step(unrolled, eta, make_context):
    context = make_context(4, 6, 1)
    module = generator("matrix", eta=eta, train_sampler="unrolled" if unrolled else "one_step")
    spy = Spy(module)
    x, s = inputs(11)
    for training in (True, False):
        module.train(training)(x, s, context)
    masked = (torch.arange(6) > context.layout.position_N[:, None, None]).expand(-1, 2, -1)
    assert len(spy.inputs) == (1 + T if unrolled else 1) + T
    for r in spy.inputs + spy.outputs:
        assert (r[masked] == 0).all()
        assert (r[~masked] != 0).all()


@pytest.mark.parametrize("form", ["factor", "matrix"])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_sampling_is_a_function_of_its_noise(form, eta, make_context):
    module = generator(form, eta=eta).eval()
    x, s = inputs(9)
    first, again, other = (rows_of(module(x, s, make_context(4, 5, step=step))) for step in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(("eta", "draws"), [(0.0, [T]), (1.0, [T, *range(T - 1, 0, -1)])])
def test_a_state_of_the_sampler_is_keyed_by_its_time(eta, draws, make_context, monkeypatch):
    """η = 0 draws R_T alone; η = 1 draws every later state too."""
    asked = []
    token = NoiseKey.token
    monkeypatch.setattr(NoiseKey, "token", lambda self, *words: asked.append(words) or token(self, *words))
    generator(eta=eta).eval()(*inputs(9), make_context(4, 5))
    assert asked == [(Purpose.SAMPLER, 0, t) for t in draws]


def test_one_sampling_step_is_the_conditional_mean(make_context):
    """g = m + ς D(R_T, S, T), with R_T the same for any number of steps."""
    context = make_context(4, 5)
    module = generator(sampling_steps=1, relative_bias=False).eval()
    module.residual_scale.mean_square.fill_(4.0)
    spy = Spy(module)
    x, s = inputs(9)
    got = rows_of(module(x, s, context))
    entries = Entries.of("factor", 4, Rows.of(context, last=False))
    m = entries.rms(module.decoder(module.latent(s).mu_MZ, s, x, entries))
    torch.testing.assert_close(got, m + 2.0 * spy.outputs[0])
    many = generator(sampling_steps=T, relative_bias=False)
    many.load_state_dict(module.state_dict())
    spies = Spy(many)
    many.eval()(x, s, context)
    assert torch.equal(spies.inputs[0], spy.inputs[0])


def gradients(module, value):
    module.zero_grad()
    value.backward(retain_graph=True)
    return {key for key, p in module.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}


def test_the_generative_loss_trains_the_denoiser_and_s_but_not_its_own_target(make_context):
    module = generator(latent_weight=0.0).train()
    x, s = inputs(9)
    generated = module(x, s, make_context(4, 5))
    reached = gradients(module, generated.loss)
    assert {key.split(".")[0] for key in reached} == {"denoiser"}
    assert s.grad.abs().sum() > 0
    assert x.grad is None


@pytest.mark.parametrize("rec_mix", [0.0, 1.0])
def test_rec_mix_chooses_what_the_ranking_loss_trains(rec_mix, make_context):
    """ρ = 0: the clean row, so decoder and latent; ρ = 1: the denoised row, so the denoiser (m, R_t are constants)."""
    module = generator(rec_mix=rec_mix).train()
    generated = module(*inputs(9), make_context(4, 5))
    reached = gradients(module, rows_of(generated).cumsum(-1).square().sum())
    expected = {"denoiser"} if rec_mix else {"decoder", "latent"}
    assert {key.split(".")[0] for key in reached} - {"logits"} == expected


def test_rec_mix_is_drawn_for_whole_sequences(make_context):
    context = make_context(*[3] * 400)
    mixed, clean, denoised = generator(rec_mix=0.3), generator(rec_mix=0.0), generator(rec_mix=1.0)
    x, s = inputs(1200)
    for other in (clean, denoised):
        other.load_state_dict(mixed.state_dict())
    g, g0, g1 = (rows_of(module.train()(x, s, context)).view(400, -1) for module in (mixed, clean, denoised))
    from_denoised = (g == g1).all(1)
    assert torch.equal(from_denoised, ~(g == g0).all(1))
    assert abs(from_denoised.float().mean() - 0.3) < 0.07


def test_the_share_that_is_diffused_is_an_unbiased_estimate(make_context, monkeypatch):
    """Weight 1/δ for a share δ: over many draws the loss and its gradients are those of diffusing everything."""
    whole, some = generator(rec_mix=0.0), generator(rec_mix=0.0, diffused_share=0.4)
    some.load_state_dict(whole.state_dict())
    x, s = inputs(4000)
    losses, gradients = [], []
    for module in (whole, some):
        module.train()
        loss = module(x, s, make_context(*[4] * 1000)).loss
        losses.append(loss.detach())
        gradients.append(torch.autograd.grad(loss, module.denoiser.w_2.weight)[0].flatten())
    assert losses[1] != losses[0]
    assert abs(losses[1] / losses[0] - 1) < 0.06
    assert torch.cosine_similarity(*gradients, dim=0) > 0.95


@pytest.mark.parametrize("form", ["factor", "matrix"])
@pytest.mark.parametrize(("rec_mix", "share"), [(0.1, 0.4), (0.3, 0.7), (0.5, 0.5)])
@pytest.mark.parametrize("unrolled", [False, True])
def test_choosing_rows_and_weighting_them_by_zero_are_the_same(
    form, rec_mix, share, unrolled, make_context, monkeypatch
):
    """A CPU computes the diffused rows alone, a GPU all of them: the same map, loss, gradients and ς."""
    context, results = make_context(4, 6, 1, 3, 2, 5, 6), []
    sampler = "unrolled" if unrolled else "one_step"
    x, s = inputs(27)
    chosen = generator(form, rec_mix=rec_mix, diffused_share=share, train_sampler=sampler).double()
    weighted = generator(form, rec_mix=rec_mix, diffused_share=share, train_sampler=sampler).double()
    weighted.load_state_dict(chosen.state_dict())
    monkeypatch.setattr(weighted, "_diffused", lambda draw_B, context: None)
    spies = Spy(chosen), Spy(weighted)
    for module in (chosen, weighted):
        generated = module.train()(x.double(), s.double(), context)
        (generated.loss + rows_of(generated).cumsum(-1).square().sum()).backward()
        results.append([generated.loss, rows_of(generated), module.residual_scale()])
        results[-1] += [p.grad for p in module.parameters() if p.grad is not None]
    assert 0 < len(spies[0].inputs[0]) < len(spies[1].inputs[0])
    assert len(results[0]) == len(results[1])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-6)  # normals are drawn in float32


def test_a_batch_without_a_diffused_sequence_trains(make_context):
    module = generator(rec_mix=0.0, diffused_share=1e-6).train()
    generated = module(*inputs(9), make_context(4, 5))
    (generated.loss + rows_of(generated).square().sum()).backward()
    assert module.residual_scale() == 1
    assert all(torch.isfinite(p.grad).all() for p in module.parameters() if p.grad is not None)


def test_a_share_below_rec_mix_is_refused():
    with pytest.raises(ValueError, match=r"diffused_share=0\.2 is less than rec_mix=0\.5"):
        generator(diffused_share=0.2)


def test_unrolled_training_backpropagates_through_all_steps(make_context):
    module = generator(train_sampler="unrolled", rec_mix=1.0).train()
    spy = Spy(module)
    generated = module(*inputs(9), make_context(4, 5))
    rows_of(generated).cumsum(-1).square().sum().backward()
    one_step, *unrolled = spy.outputs
    assert one_step.grad is None
    assert len(unrolled) == T
    assert all(output.grad.abs().sum() > 0 for output in unrolled)


def test_the_loss_is_the_weighted_error_over_valid_entries(make_context):
    """E clip(SNR_t, 1, 5)·mean_valid (R̂_0 − R_0)², with R_0 recovered from the noised row."""
    context = make_context(4, 6, 1)
    module = generator("matrix", heads=1, latent_weight=0.0, literal=True).train()
    spy = Spy(module)
    loss = module(*inputs(11), context).loss
    entries = Entries.of("matrix", 4, Rows.of(context, last=False))
    eps = entries.normal(context.noise.token(Purpose.DIFFUSION, 0), 1, like=loss)
    t = module._draw_t(context.noise)[context.layout.row_N]
    a = module.times.alpha_bar_T.double()[t]
    expected = 0.0
    for i, position in enumerate(context.layout.position_N.tolist()):
        r_t, e, clean = (r[i, 0, : position + 1].double() for r in (spy.inputs[0], eps, spy.outputs[0]))
        r_0 = (r_t - (1 - a[i]).sqrt() * e) / a[i].sqrt()
        expected += (a[i] / (1 - a[i])).clamp(1, 5) * (clean - r_0).square().mean() / 11
    torch.testing.assert_close(loss.double(), expected, atol=1e-4, rtol=1e-3)


def test_literal_diffuses_the_clean_row_itself(make_context):
    """m = 0 and ς = 1: the row ranked through the denoiser is the denoiser's output."""
    module = generator(literal=True, rec_mix=1.0).train()
    module.residual_scale.mean_square.fill_(9.0)
    spy = Spy(module)
    generated = module(*inputs(9), make_context(4, 5))
    torch.testing.assert_close(rows_of(generated), spy.outputs[0])
    assert generated.statistics["residual_scale"] == 1
    assert module.residual_scale.mean_square == 9


def test_residual_scale_is_the_running_rms_and_is_used_before_it_is_updated(make_context):
    context = make_context(4, 6)
    scale, entries = ResidualScale(), Entries.of("matrix", 4, Rows.of(context, last=False))
    assert scale() == 1
    squares = []
    for factor in (2.0, 5.0):
        residual = entries.mask(factor * torch.randn(10, 2, 6))
        scale.update(residual, torch.ones(10, 1, 1, dtype=torch.bool), entries, context)
        valid = torch.arange(6) <= context.layout.position_N[:, None]
        squares.append(residual.transpose(1, 2)[valid].square().mean())
    expected = MOMENTUM * squares[0] + (1 - MOMENTUM) * squares[1]
    torch.testing.assert_close(scale(), expected.sqrt())


def test_residual_scale_moves_in_training_only_and_is_saved(make_context):
    module = generator().eval()
    x, s = inputs(9)
    module(x, s, make_context(4, 5))
    assert module.residual_scale.mean_square == 0
    first = module.train()(x, s, make_context(4, 5)).statistics["residual_scale"]
    assert first == 1
    assert module.residual_scale.mean_square > 0
    saved = {key: value for key, value in module.state_dict().items() if "residual" in key or "times" in key}
    assert saved == {"residual_scale.mean_square": module.residual_scale.mean_square}


def test_buffers_stay_float32_when_the_module_is_cast():
    module = generator()
    module.residual_scale.mean_square.fill_(1 / 3)
    module.bfloat16()
    assert module.denoiser.w_2.weight.dtype == torch.bfloat16
    assert {buffer.dtype for buffer in module.buffers()} == {torch.float32}
    assert module.residual_scale.mean_square == torch.tensor(1 / 3)
