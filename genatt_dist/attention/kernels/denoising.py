# mypy: disable-error-code="no-untyped-def"
"""The Triton kernel of `sample_rows`: all S denoising steps of 64 rows by one program (MATH §5).

Weights are read once and stay in shared memory; state and hidden layers are registers; normals are made where they are
used, by the hash of noise.py. A step reads a row of τ, four scalars and what did not fit the registers: caches hold
both. Rows and entries that do not exist are masked: their state is exactly 0.

What the compiler makes of it, registers and all, says `python -m benchmarks.kernels resources`, without a GPU too.

Legend: M rows of this program, G denoiser width d_h, H heads, K entries of a generated row, C = columns h·K + k of all
heads. Upper-case arguments are compile-time constants that hold M, G and C.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

from genatt_dist.attention import noise

GOLDEN = tl.constexpr(noise._GOLDEN)
MIX_1 = tl.constexpr(noise._MIX_1)
MIX_2 = tl.constexpr(noise._MIX_2)
TURN = tl.constexpr(2 * math.pi)
HALF_ROOT = tl.constexpr(math.sqrt(0.5))
CELL = tl.constexpr(2.0**-23)


@triton.jit
def mix(word):
    """SplitMix64's finaliser; on uint64, shifts are logical."""
    word = (word ^ (word >> 30)) * MIX_1
    word = (word ^ (word >> 27)) * MIX_2
    return word ^ (word >> 31)


@triton.jit
def derive(key, word):
    """noise.derive for one word."""
    return mix(key * GOLDEN + word * MIX_2 + GOLDEN)


@triton.jit
def normal(key, k):
    """Number k of noise.normal(key, …). Entries 2c and 2c + 1 are the two halves of one word's Box–Muller pair."""
    word = mix(mix(key + ((k // 2).to(tl.uint64) + 1) * GOLDEN))
    radius_u = ((word >> 41).to(tl.float32) + 0.5) * CELL
    angle = TURN * (((word & 0x7FFFFF).to(tl.float32) + 0.5) * CELL)
    radius = tl.sqrt_rn(-2.0 * tl.log(radius_u))
    return radius * tl.where(k % 2 == 0, tl.cos(angle), tl.sin(angle))


@triton.jit
def entry_normal(token_M, word, h_C, k_C, valid_MC):
    """Entries.normal under the keys derive(token, word): [M, C], 0 at entries that do not exist."""
    key_M = derive(token_M, word.to(tl.uint64))
    key_MC = derive(key_M[:, None], h_C[None, :].to(tl.uint64))
    return tl.where(valid_MC, normal(key_MC, k_C[None, :]), 0.0)


@triton.jit
def gelu(x):
    """The exact one, by erf, as torch's default."""
    return 0.5 * x * (1.0 + tl.erf(x * HALF_ROOT))


@triton.jit
def linear(x, weight, PRECISION: tl.constexpr):
    """x · weight in float32, x rounded to the weight's dtype first, as torch's layer has its inputs."""
    x = x.to(weight.dtype)
    if PRECISION == "ieee":  # the interpreter, which cannot multiply bfloat16: the same products, exact in float32
        return tl.dot(x.to(tl.float32), weight.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(x, weight, input_precision=PRECISION)


# Sizes that change from batch to batch must not compile the kernel anew.
@triton.jit(do_not_specialize=["num_rows", "num_steps", "width"])
def sample_kernel(
    out,  # [num_rows, heads, width]
    given,  # [num_rows, generator]
    tau,  # [T + 1, generator]
    w_g,  # [generator, heads * max_width]
    w_2,  # [generator, generator]
    b_2,  # [generator]
    w_3,  # [heads, max_width, generator]
    b_3,  # [heads, max_width]
    token,  # [num_rows]
    count,  # [num_rows]: entries a head has
    time,  # [num_steps]
    word,  # [num_steps]
    coefficient,  # [num_steps, 3]
    num_rows,
    num_steps,
    generator,
    heads,
    width,
    max_width,
    ROWS: tl.constexpr,
    GENERATOR: tl.constexpr,
    ENTRIES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """R_0 of ROWS rows. With no steps at all, R_T."""
    row_M = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    g_G = tl.arange(0, GENERATOR)
    column_C = tl.arange(0, ENTRIES)
    h_C, k_C = column_C // width, column_C % width
    is_row_M, is_g_G, is_column_C = row_M < num_rows, g_G < generator, column_C < heads * width
    weight_C = h_C * max_width + k_C  # a batch narrower than the layers uses the first of each head's columns

    is_CG = is_column_C[:, None] & is_g_G[None, :]
    w_g_CG = tl.load(w_g + g_G[None, :] * (heads * max_width) + weight_C[:, None], mask=is_CG, other=0.0)
    w_2_GG = tl.load(w_2 + g_G[None, :] * generator + g_G[:, None], mask=is_g_G[:, None] & is_g_G[None, :], other=0.0)
    b_2_G = tl.load(b_2 + g_G, mask=is_g_G, other=0.0).to(tl.float32)
    is_GC = is_g_G[:, None] & is_column_C[None, :]
    w_3_GC = tl.load(w_3 + weight_C[None, :] * generator + g_G[:, None], mask=is_GC, other=0.0)
    b_3_C = tl.load(b_3 + weight_C, mask=is_column_C, other=0.0).to(tl.float32)

    is_MG = is_row_M[:, None] & is_g_G[None, :]
    given_MG = tl.load(given + row_M[:, None] * generator + g_G[None, :], mask=is_MG, other=0.0).to(tl.float32)
    token_M = tl.load(token + row_M, mask=is_row_M, other=0).to(tl.uint64)
    count_M = tl.load(count + row_M, mask=is_row_M, other=0)
    valid_MC = (k_C[None, :] < count_M[:, None]) & is_column_C[None, :]

    r_MC = entry_normal(token_M, tl.load(word), h_C, k_C, valid_MC)
    for step in range(num_steps):
        tau_G = tl.load(tau + tl.load(time + step) * generator + g_G, mask=is_g_G, other=0.0).to(tl.float32)
        h_MG = gelu(linear(r_MC, w_g_CG, PRECISION) + (given_MG + tau_G[None, :]))
        h_MG = h_MG + gelu(linear(h_MG, w_2_GG, PRECISION) + b_2_G[None, :])
        clean_MC = tl.where(valid_MC, linear(h_MG, w_3_GC, PRECISION) + b_3_C[None, :], 0.0)

        a = tl.load(coefficient + 3 * step)
        b = tl.load(coefficient + 3 * step + 1)
        sigma = tl.load(coefficient + 3 * step + 2)
        r_MC = a * clean_MC + b * r_MC
        if sigma > 0.0:  # η > 0, and not the last step
            r_MC += sigma * entry_normal(token_M, tl.load(word + step + 1), h_C, k_C, valid_MC)

    is_MC = is_row_M[:, None] & is_column_C[None, :]
    tl.store(out + row_M[:, None] * (heads * width) + column_C[None, :], r_MC, mask=is_MC)
