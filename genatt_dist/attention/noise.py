"""Keyed noise: every random number is a pure function of what it is for, never of rank, world size or batch layout
(MATH §7.7).

A key is an int64 tensor (or a Python int) that `derive` folds words into: seed, purpose, step, window id, position,
block, head … Draws hash the key with a counter (SplitMix64's finaliser, Steele et al. 2014), so they are vectorised,
stateless, and equal on CPU and GPU (normals to rounding). int64 arithmetic in torch wraps around, as the hash wants.

Which number a key gives is a contract: published results and the GPU kernels rest on it, and tests pin it.
`benchmarks/noise.py` measures what the draws cost.

Legend: N keys (real tokens of the batch), M numbers a key.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

import torch
from torch import Tensor

_MASK: Final = (1 << 64) - 1
_GOLDEN: Final = 0x9E3779B97F4A7C15
_MIX_1: Final = 0xBF58476D1CE4E5B9
_MIX_2: Final = 0x94D049BB133111EB
# Words hashed at a time by one CPU thread: the block and its scratch stay in a core's L2 cache over the passes of the
# hash, and 32,768 elements are what torch gives one thread at least.
_BLOCK: Final = 1 << 15


class Purpose(IntEnum):
    """What a draw is for. Two purposes never share a key."""

    # Roots: folded into the seed first, so that nothing below one can meet anything below another.
    INITIAL = 1
    SHUFFLE = 2
    NEGATIVE = 3
    TRAINING = 4
    REQUEST = 5
    # Draws of a forward pass: folded into a token's or a sequence's key.
    DROPOUT = 11
    LATENT = 12
    DIFFUSION = 13
    DIFFUSION_STEP = 14
    MIXTURE = 15
    SAMPLER = 16
    NEGATIVE_OF_TOKEN = 17
    LOGIT = 18


def _signed(word: int) -> int:
    """The 64-bit word as the int64 with the same bits."""
    word &= _MASK
    return word - (1 << 64) if word >> 63 else word


def _mix_int(word: int) -> int:
    word &= _MASK
    word = ((word ^ (word >> 30)) * _MIX_1) & _MASK
    word = ((word ^ (word >> 27)) * _MIX_2) & _MASK
    return _signed(word ^ (word >> 31))


def _mix_(word: Tensor, scratch: Tensor) -> None:
    """SplitMix64's finaliser, in place; `scratch` is as large as `word`."""
    for shift, factor in ((30, _MIX_1), (27, _MIX_2), (31, None)):
        torch.bitwise_right_shift(word, shift, out=scratch)
        scratch.bitwise_and_((1 << (64 - shift)) - 1)  # torch's shift is arithmetic, the hash wants a logical one
        word.bitwise_xor_(scratch)
        if factor is not None:
            word.mul_(_signed(factor))


def derive(key: int | Tensor, *words: int | Tensor) -> int | Tensor:
    """Fold words into a key, one after the other; the order matters. Tensors broadcast; ints stay ints."""
    for word in words:
        if isinstance(key, Tensor) or isinstance(word, Tensor):
            left = key * _signed(_GOLDEN) if isinstance(key, Tensor) else _signed(key * _GOLDEN + _GOLDEN)
            right = word * _signed(_MIX_2) if isinstance(word, Tensor) else _signed(word * _MIX_2 + _GOLDEN)
            mixed = left + right
            if isinstance(key, Tensor) and isinstance(word, Tensor):
                mixed += _signed(_GOLDEN)
            assert isinstance(mixed, Tensor)
            _mix_(mixed, torch.empty_like(mixed))
            key = mixed
        else:
            key = _mix_int(key * _GOLDEN + word * _MIX_2 + _GOLDEN)
    return key


def bits(key: Tensor, count: int) -> Tensor:
    """`count` 64-bit words for each key: int64 of shape key.shape + (count,)."""
    counter = torch.arange(1, count + 1, device=key.device) * _signed(_GOLDEN)
    word = (key.unsqueeze(-1) + counter).contiguous()
    flat = word.view(-1)
    block = _BLOCK * torch.get_num_threads() if word.device.type == "cpu" else len(flat)
    scratch = torch.empty_like(flat[:block])
    for part in flat.split(block) if len(flat) > block else (flat,):
        part_scratch = scratch[: len(part)]
        _mix_(part, part_scratch)
        _mix_(part, part_scratch)
    return word


def _unit(word: Tensor) -> Tensor:
    """(m + ½)·2^-23 in (0, 1), exactly, for the lowest 23 bits m of each int64: float32."""
    # m becomes the mantissa of a number in [1, 2).
    half = word.to(torch.int32).bitwise_and_(0x7FFFFF).bitwise_or_(0x3F800000)
    return half.view(torch.float32).sub_(1 - 2.0**-24)


def uniform(key: Tensor, count: int) -> Tensor:
    """`count` numbers in (0, 1) for each key: float32 of shape key.shape + (count,), on a grid of 2^-23 that excludes
    both ends.
    """
    return _unit(bits(key, count).bitwise_right_shift_(41))


def normal(key: Tensor, count: int) -> Tensor:
    """`count` standard normals for each key (Box–Muller): float32 of shape key.shape + (count,)."""
    word = bits(key, (count + 1) // 2)
    angle = _unit(word).mul_(2.0 * math.pi)
    radius = _unit(word.bitwise_right_shift_(41)).log_().mul_(-2.0).sqrt_()
    # A complex number is its two parts side by side: several times faster than stacking them.
    pair = torch.view_as_real(torch.complex(radius * angle.cos(), radius * angle.sin()))
    return pair.flatten(-2)[..., :count]


def keep_mask(key: Tensor, count: int, drop: float) -> Tensor:
    """Booleans that are False with probability `drop` < 1 (to 2^-16): shape key.shape + (count,). One hash serves
    four.
    """
    # Four lanes of a word, its lowest first (little-endian); signed, so uniform on −32768..32767.
    lanes = bits(key, (count + 3) // 4).view(torch.int16)
    # Compared in place, because a comparison that writes booleans is no vector loop on the CPU.
    return lanes.ge_(min(round(drop * 65536), 65535) - 32768)[..., :count].to(torch.bool)


def integers(key: Tensor, count: int, high: int) -> Tensor:
    """`count` integers in [0, high) for each key: int64. The modulo's bias is below high/2^62."""
    return bits(key, count).bitwise_right_shift_(2).bitwise_and_((1 << 62) - 1) % high


@dataclass(frozen=True)
class NoiseKey:
    """The noise of one forward pass: a key for each real token, already holding seed, step (or request), window id and
    position.

    token_N: int64 keys of the real tokens. sequence_B: int64 keys of the sequences (for draws made once a sequence).
    """

    token_N: Tensor
    sequence_B: Tensor

    @staticmethod
    def make(seed: int, step: int, window_B: Tensor, row_N: Tensor, position_N: Tensor) -> NoiseKey:
        """Keys of a batch. window_B: ids of its windows; row_N, position_N: sequence and position of each real
        token.
        """
        sequence = derive(derive(seed, step), window_B)
        assert isinstance(sequence, Tensor)
        token = derive(sequence[row_N], position_N)
        assert isinstance(token, Tensor)
        return NoiseKey(token, sequence)

    def token(self, purpose: Purpose, *words: int) -> Tensor:
        """Keys of the real tokens for one purpose; `words` say where: block, head, sample, diffusion step …"""
        key = derive(self.token_N, derive(int(purpose), *words))
        assert isinstance(key, Tensor)
        return key

    def sequence(self, purpose: Purpose, *words: int) -> Tensor:
        """Keys of the sequences for one purpose."""
        key = derive(self.sequence_B, derive(int(purpose), *words))
        assert isinstance(key, Tensor)
        return key
