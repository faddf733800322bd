"""The kernel that runs all denoising steps draws what the plain sampler draws.

Where there is no GPU, Triton's interpreter runs it. Both paths are held against float64: they round the same
operations to the same width, in another order, so their errors must be of one size; a wrong term is ten thousand times
larger.
"""

import copy
import sys
from itertools import product

import pytest
import torch
from torch import nn

from benchmarks.kernels import BUILDS, compiled
from data_pipeline.errors import GenattError
from genatt_dist.attention import kernels, sampler
from genatt_dist.attention.base import Rows
from genatt_dist.attention.denoiser import Denoiser, Times
from genatt_dist.attention.entries import Entries
from genatt_dist.attention.noise import Purpose, derive, normal
from genatt_dist.config import ModelConfig
from genatt_dist.model.backbone import Backbone
from genatt_dist.model.context import Context

pytest.importorskip("triton")

# 67 rows: one block of the kernel and 3 of the next. Up to 6 entries where the layers have 9 (matrix), or 5 (factor).
LENGTHS, MAX_LEN, RANK, GENERATOR, T = (6, 1, 4, 6, 6, 6, 6, 6, 6, 6, 6, 6, 2), 9, 5, 20, 10
# Form, heads, S, η; one step draws nothing but its start, whatever η.
CASES = [case for case in product(["factor", "matrix"], [1, 2], [1, 4, 10], [0.0, 0.5, 1.0]) if case[2:] != (1, 0.5)]
CASES = [case for case in CASES if case[2:] != (1, 1.0)]
MODULE = "genatt_dist.attention.kernels.denoising"


@pytest.fixture
def interpreter(monkeypatch):
    """Triton decides where a kernel is defined whether to interpret it: it is imported anew, and forgotten after."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    yield
    sys.modules.pop(MODULE, None)


class Draw:
    """A denoiser with random weights, its rows, and the two ways to sample them."""

    def __init__(self, context: Context, form: str, heads: int, dtype=torch.float32, device="cpu"):
        model = ModelConfig(
            hidden_size=4 * heads,
            num_heads=heads,
            attention={"type": "diffusion", "form": form, "rank": RANK, "generator_size": GENERATOR},
        )
        self.dtype, self.device, self.heads = dtype, device, heads
        self.denoiser = Denoiser(model, model.attention, RANK if form == "factor" else MAX_LEN).requires_grad_(False)
        for parameter in self.denoiser.parameters():
            nn.init.normal_(parameter, std=0.3)
        rows = Rows.of(context, last=False)
        self.entries, self.noise, self.times = Entries.of(form, RANK, rows), rows.noise("a test"), Times("linear", T)
        # What both paths are given is rounded to their dtype beforehand.
        self.denoiser.to(dtype)
        self.given_MG = torch.randn(len(rows.position_M), GENERATOR).to(dtype)
        self.tau_TG = torch.randn(T + 1, GENERATOR).to(dtype)

    def plain(self, num_steps: int, eta: float, dtype: torch.dtype) -> torch.Tensor:
        denoiser = copy.deepcopy(self.denoiser).to(dtype)
        given_MG, tau_TG = self.given_MG.to(dtype), self.tau_TG.to(dtype)

        def draw(t: int) -> torch.Tensor:
            return self.entries.normal(self.noise.token(Purpose.SAMPLER, 1, t), self.heads, like=given_MG)

        def denoise(r_MHK: torch.Tensor, t: int) -> torch.Tensor:
            return denoiser(denoiser.input(r_MHK, onto=given_MG + tau_TG[t]), self.entries)

        return sampler.sample(denoise, draw, self.times.alpha_bar, sampler.times(T, num_steps), eta)

    @torch.no_grad()
    def fused(self, steps: list[int], eta: float) -> torch.Tensor | None:
        words = [derive(int(Purpose.SAMPLER), 1, t) for t in steps or [T]]
        entries = Entries(
            self.entries.width,
            self.entries.count_M11.to(self.device),
            None if self.entries.valid_M1K is None else self.entries.valid_M1K.to(self.device),
        )
        drawn = kernels.sample_rows(
            copy.deepcopy(self.denoiser).to(self.device),
            self.given_MG.to(self.device),
            self.tau_TG.to(self.device),
            entries,
            self.noise.token_N.to(self.device),
            words,
            self.times.alpha_bar,
            steps,
            eta,
        )
        return None if drawn is None else drawn.cpu()

    def error(self, got: torch.Tensor, num_steps: int, eta: float) -> float:
        """Root mean square difference to float64."""
        return (got.double() - self.plain(num_steps, eta, torch.float64)).square().mean().sqrt().item()


def check(draw: Draw, num_steps: int, eta: float, ratio: float, magnitude: float) -> None:
    """The kernel's error is at most `ratio` times the plain path's, which is below `magnitude`."""
    got = draw.fused(sampler.times(T, num_steps), eta)
    assert got is not None
    assert got.dtype is draw.dtype
    if draw.entries.valid_M1K is not None:
        assert torch.equal(got, draw.entries.mask(got))
    plain_error = draw.error(draw.plain(num_steps, eta, draw.dtype), num_steps, eta)
    assert 0 < plain_error < magnitude
    assert draw.error(got, num_steps, eta) < ratio * plain_error


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize(("form", "heads", "num_steps", "eta"), CASES)
def test_all_steps_in_one_kernel_are_the_plain_sampler(make_context, form, heads, num_steps, eta):
    check(Draw(make_context(*LENGTHS), form, heads), num_steps, eta, ratio=2, magnitude=1e-5)


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("form", ["factor", "matrix"])
def test_bfloat16_is_as_far_from_the_truth_as_the_plain_sampler(make_context, form):
    """The interpreter cuts a float32 off to bfloat16 where hardware rounds it: that alone is twice the error."""
    check(Draw(make_context(*LENGTHS), form, 2, torch.bfloat16), 4, 0.5, ratio=2 * 1.2, magnitude=0.1)


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize(("form", "heads"), [("factor", 2), ("matrix", 1)])
def test_normals_made_in_the_kernel_are_noise_normal(make_context, form, heads):
    """With no steps the kernel returns R_T. A wrong bit of a hash would change a number by about 1; log, sin and cos
    may differ by 2 units in the last place, at a radius of at most √(2 ln 2^24) < 5.8.
    """
    draw = Draw(make_context(*LENGTHS), form, heads)
    key_MH = derive(draw.noise.token(Purpose.SAMPLER, 1, T)[:, None], torch.arange(heads))
    expected = draw.entries.mask(normal(key_MH, draw.entries.width))
    torch.testing.assert_close(draw.fused([], 0.0), expected, rtol=0, atol=5.8 * 5 * 2.0**-23)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(("form", "heads", "num_steps", "eta"), CASES)
def test_on_the_gpu_too(make_context, monkeypatch, form, heads, num_steps, eta):
    """Tensor cores cut off where they align addends, so float32 may lose a few bits more; TF32 would lose ten. In
    bfloat16 the kernel rounds less often than the plain path.
    """
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    context = make_context(*LENGTHS)
    check(Draw(context, form, heads, device="cuda"), num_steps, eta, ratio=8, magnitude=1e-5)
    check(Draw(context, form, heads, torch.bfloat16, "cuda"), num_steps, eta, ratio=1.2, magnitude=0.1)


def test_reasons_to_take_the_plain_path(make_context, monkeypatch):
    def why(dtype=torch.float32, generator=128, entries=16):
        return kernels.unsupported(torch.device("cpu"), dtype, generator, entries)

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "gradients" in why()
    with torch.no_grad():
        assert "not on a CUDA device" in why()
        assert Draw(make_context(3), "factor", 1).fused([T], 0.0) is None
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        assert why() is None
        assert "float64" in why(dtype=torch.float64)
        assert "200 entries" in why(entries=200)
        assert "generator_size=256" in why(generator=256)
        with monkeypatch.context() as patch:
            patch.setattr(kernels, "_triton_installed", lambda: False)
            assert why() == "triton is not installed"
        monkeypatch.setenv("GENATT_KERNELS", "off")
        assert why() == "GENATT_KERNELS=off"
        monkeypatch.setenv("GENATT_KERNELS", "on")
        with pytest.raises(GenattError, match="GENATT_KERNELS=on is unknown: use auto or off"):
            why()


@pytest.mark.usefixtures("interpreter")
def test_evaluation_takes_the_kernel_and_training_does_not(make_context, monkeypatch):
    """D-GenAtt's states with it equal those without it; the plain path is there for gradients."""
    taken = []
    sample_rows = kernels.sample_rows
    monkeypatch.setattr(kernels, "sample_rows", lambda *given: taken.append(sample_rows(*given)) or taken[-1])
    attention = {"type": "diffusion", "generator_size": GENERATOR, "rank": RANK, "eta": 0.5}
    backbone = Backbone(ModelConfig(hidden_size=8, dropout=0, attention=attention), MAX_LEN)
    context, rows_ND = make_context(4, 2), torch.randn(6, 8)
    with torch.no_grad():
        states_ND = backbone.eval()(rows_ND, context).states_ND
        assert [drawn is not None for drawn in taken] == [True, True]  # one a block
        monkeypatch.setenv("GENATT_KERNELS", "off")
        torch.testing.assert_close(backbone(rows_ND, context).states_ND, states_ND, rtol=1e-5, atol=1e-5)
    monkeypatch.delenv("GENATT_KERNELS")
    backbone.train()(rows_ND, context).states_ND.sum().backward()
    assert all(drawn is None for drawn in taken[2:])


@pytest.mark.slow
@pytest.mark.parametrize("capability", BUILDS)
@pytest.mark.parametrize(("dtype", "precision"), [(torch.float32, "bf16x6"), (torch.bfloat16, "tf32")])
def test_it_compiles_within_the_shared_memory_planned(monkeypatch, capability, dtype, precision):
    """For GPUs that need not be there. What the launch checks against the device is an upper bound."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    plan = kernels.Plan(dtype, 128, 16, precision)
    assert 0 < compiled(plan, capability).metadata.shared <= plan.shared_bytes
