"""Fused kernels: the plain code states what is computed, a kernel computes the same in one launch where it can.

`sample_rows` is DDIM with all its steps (sampler.sample of the Denoiser) on CUDA. It answers None where it does not
apply, and the caller then takes the plain path; `unsupported` says why. Triton comes with torch's CUDA wheels and is
imported at the first launch. GENATT_KERNELS=off in the environment forces the plain path; TRITON_INTERPRET=1 lets the
kernel run on the CPU, in Triton's interpreter (slow: for tests).

Legend: M rows that are made, G denoiser width d_h, H heads, K entries of a generated row, K' = H·K, T diffusion steps,
S sampler steps.
"""

from __future__ import annotations

import importlib
import math
import os
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.util import find_spec
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from data_pipeline.errors import GenattError
from genatt_dist.attention import sampler
from genatt_dist.attention.denoiser import Denoiser
from genatt_dist.attention.entries import Entries

# A program makes 64 rows with 4 warps: each holds 16 whole rows, so that what one product gives is the next one's
# operand within a warp. 64 is also the least a Hopper warpgroup multiplies.
ROWS, WARPS = 64, 4
# Wider layers would not fit the registers: 64 rows × 128 are already 64 of a thread's 255, and three such live at once.
MAX_WIDTH = 128


@dataclass(frozen=True)
class Plan:
    """How the kernel is compiled: powers of two of at least 16 (what a matrix product takes) that hold G and K'.

    precision: of products of float32. `bf16x6` (each number as three bfloat16, the six products above 2^-24 of the
    result) is float32 to rounding and keeps 6 bytes a weight; `tf32x3` does no better and keeps 8, and `ieee` would
    leave the tensor cores. Where torch is told to multiply float32 in less (`torch.set_float32_matmul_precision`), so
    does the kernel: `tf32`. The interpreter knows `ieee` alone.
    """

    dtype: torch.dtype
    generator: int
    entries: int
    precision: str

    @staticmethod
    def of(dtype: torch.dtype, generator: int, entries: int, interpreted: bool = False) -> Plan:
        """The plan for G = `generator` and K' = `entries`."""
        highest = torch.get_float32_matmul_precision() == "highest"
        precision = "ieee" if interpreted else "bf16x6" if highest else "tf32"
        return Plan(dtype, _power(generator), _power(entries), precision)

    @property
    def shared_bytes(self) -> int:
        """Shared memory a program needs at most: the weights, once for all steps, and one layer's outputs on their way
        from one register layout to another.
        """
        a_weight = 2 if self.dtype is torch.bfloat16 else {"bf16x6": 6, "tf32": 4, "ieee": 4}[self.precision]
        weights = self.generator * (self.generator + 2 * self.entries)
        return weights * a_weight + ROWS * self.generator * 4


def unsupported(device: torch.device, dtype: torch.dtype, generator: int, entries: int) -> str | None:
    """Why `sample_rows` would answer None for G = `generator` and K' = `entries`, or None where it would not.

    Raises GenattError where GENATT_KERNELS has a value it does not know.
    """
    if not _switched_on():
        return "GENATT_KERNELS=off"
    if torch.is_grad_enabled():
        return "gradients are recorded, and the kernel has no backward"
    if dtype not in (torch.float32, torch.bfloat16):
        return f"dtype {dtype} is neither float32 nor bfloat16"
    if max(generator, entries) > MAX_WIDTH:
        return f"generator_size={generator} with {entries} entries a row: more than {MAX_WIDTH} of either do not fit"
    interpreted = _interpreted()
    if device.type != "cuda" and not (interpreted and device.type == "cpu"):
        return f"the rows are on {device.type}, not on a CUDA device"
    if not _triton_installed():
        return "triton is not installed"
    if interpreted:
        return None
    if torch.version.cuda is None:
        return "this torch is not built for CUDA"
    properties = torch.cuda.get_device_properties(device)
    if properties.major < 8:
        return f"compute capability {properties.major}.{properties.minor} is below 8.0"
    # torch's stubs do not know what a program may have when it asks, as Triton does.
    there = getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block)
    needed = Plan.of(dtype, generator, entries).shared_bytes
    if needed > there:
        return f"the weights take up to {needed} bytes of shared memory, the device has {there}"
    return None


def sample_rows(
    denoiser: Denoiser,
    given_MG: Tensor,
    tau_TG: Tensor,
    entries: Entries,
    token_M: Tensor,
    words: Sequence[int],
    alpha_bar: Sequence[float],
    steps: Sequence[int],
    eta: float,
) -> Tensor | None:
    """R_0 [M, H, K] as `sampler.sample` draws it, in the dtype of given_MG; None where `unsupported` has a reason
    or there are no rows.

    given_MG: W_s S. tau_TG: W_τ τ(t) + b for t = 0..T.
    token_M: int64 keys of the rows. words: for each of `steps`, the word that makes them the keys of that step's draw;
        normals follow as `Entries.normal` has them, heads and all.
    alpha_bar, steps, eta: as for `sampler.sample`.

    The state stays float32 in between, in bfloat16 too (only products are rounded), so that there it is closer to exact
    arithmetic than the plain path. Nothing waits for the device.
    """
    heads, generator = denoiser.input.heads, given_MG.shape[1]
    device, width = given_MG.device, entries.width
    # Under ZeRO-3 parameters are whole only inside the forward of the module that owns them, and empty here.
    partitioned = denoiser.w_2.weight.numel() == 0 or denoiser.w_3.weight.numel() == 0
    if len(given_MG) == 0 or partitioned or unsupported(device, given_MG.dtype, generator, heads * width) is not None:
        return None
    plan = Plan.of(given_MG.dtype, generator, heads * width, _interpreted())
    time_S, word_S, coefficient_S3 = _tables(tuple(steps), tuple(words), tuple(alpha_bar), eta, device)
    out_MHK = torch.empty((len(given_MG), heads, width), dtype=given_MG.dtype, device=device)
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        _triton_code().sample_kernel[(-(-len(given_MG) // ROWS),)](
            out_MHK,
            given_MG.contiguous(),
            tau_TG.contiguous(),
            denoiser.input.w_g,
            denoiser.w_2.weight,
            denoiser.w_2.bias,
            denoiser.w_3.weight,
            denoiser.w_3.bias,
            token_M.contiguous(),
            entries.count_M11.contiguous(),
            time_S,
            word_S,
            coefficient_S3,
            len(given_MG),
            len(steps),
            generator,
            heads,
            width,
            denoiser.w_3.weight.shape[1],
            ROWS=ROWS,
            GENERATOR=plan.generator,
            ENTRIES=plan.entries,
            PRECISION=plan.precision,
            num_warps=WARPS,
            num_stages=1,  # the loop over steps loads nothing that could be fetched ahead
        )
    return out_MHK


@lru_cache(maxsize=64)
def _tables(
    steps: tuple[int, ...], words: tuple[int, ...], alpha_bar: tuple[float, ...], eta: float, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """What differs from step to step, on the device: times, words of the draws, and (a, b, σ) of R ← a R̂_0 + b R + σξ.

    That is `sampler.step` with ε̂ put in. The last step's (1, 0, 0) returns R̂_0. Kept, because copying them to the
    device would wait for it.
    """
    rows = []
    for t, s in pairwise(steps):
        sigma = sampler.step_sigma(alpha_bar[t], alpha_bar[s], eta)
        b = math.sqrt(max(1 - alpha_bar[s] - sigma**2, 0.0) / (1 - alpha_bar[t]))
        rows.append((math.sqrt(alpha_bar[s]) - b * math.sqrt(alpha_bar[t]), b, sigma))
    rows.append((1.0, 0.0, 0.0))
    return (
        torch.tensor(steps, dtype=torch.int32, device=device),
        torch.tensor(words, dtype=torch.int64, device=device),
        torch.tensor(rows, dtype=torch.float32, device=device),
    )


def _switched_on() -> bool:
    value = os.environ.get("GENATT_KERNELS", "auto")
    if value not in ("auto", "off"):
        raise GenattError(f"environment variable GENATT_KERNELS={value} is unknown: use auto or off")
    return value == "auto"


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def _triton_installed() -> bool:
    return find_spec("triton") is not None


def _triton_code() -> Any:
    """Imported late: `import genatt_dist` must not need Triton, and Triton reads TRITON_INTERPRET then."""
    return importlib.import_module("genatt_dist.attention.kernels.denoising")


def _power(size: int) -> int:
    """The least power of two that is at least `size` and 16."""
    return max(16, 1 << (size - 1).bit_length())
