"""Keyed noise: every random number is a pure function of what it is for, never of rank, world size or batch layout
(MATH §7.7).

A key is an int64 tensor (or a Python int) that `derive` folds words into: seed, purpose, step, window id, position,
block, head … Draws hash the key with a counter (SplitMix64's finaliser, Steele et al. 2014), so they are vectorised,
stateless, and equal on CPU and GPU (normals to rounding). int64 arithmetic in torch wraps around, as the hash wants.

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


def _signed(word: int) -> int:
    """The 64-bit word as the int64 with the same bits."""
    word &= _MASK
    return word - (1 << 64) if word >> 63 else word


def _mix_int(word: int) -> int:
    word &= _MASK
    word = ((word ^ (word >> 30)) * _MIX_1) & _MASK
    word = ((word ^ (word >> 27)) * _MIX_2) & _MASK
    return _signed(word ^ (word >> 31))


def _shift(word: Tensor, bits: int) -> Tensor:
    """Logical right shift: torch's is arithmetic."""
    return (word >> bits) & ((1 << (64 - bits)) - 1)


def _mix(word: Tensor) -> Tensor:
    word = (word ^ _shift(word, 30)) * _signed(_MIX_1)
    word = (word ^ _shift(word, 27)) * _signed(_MIX_2)
    return word ^ _shift(word, 31)


def derive(key: int | Tensor, *words: int | Tensor) -> int | Tensor:
    """Fold words into a key, one after the other; the order matters. Tensors broadcast; ints stay ints."""
    for word in words:
        if isinstance(key, Tensor) or isinstance(word, Tensor):
            left = key if isinstance(key, Tensor) else torch.as_tensor(_signed(key * _GOLDEN), device=word.device)  # type: ignore[union-attr]
            left = left * _signed(_GOLDEN) if isinstance(key, Tensor) else left
            right = word * _signed(_MIX_2) if isinstance(word, Tensor) else _signed(word * _MIX_2)
            key = _mix(left + right + _signed(_GOLDEN))
        else:
            key = _mix_int(key * _GOLDEN + word * _MIX_2 + _GOLDEN)
    return key


def bits(key: Tensor, count: int) -> Tensor:
    """`count` 64-bit words for each key: int64 of shape key.shape + (count,)."""
    counter = torch.arange(1, count + 1, device=key.device) * _signed(_GOLDEN)
    return _mix(_mix(key.unsqueeze(-1) + counter))


def uniform(key: Tensor, count: int) -> Tensor:
    """`count` numbers in (0, 1) for each key: float32 of shape key.shape + (count,), on a grid of 2^-23 that excludes
    both ends.
    """
    return (_shift(bits(key, count), 41).float() + 0.5) * 2.0**-23


def normal(key: Tensor, count: int) -> Tensor:
    """`count` standard normals for each key (Box–Muller): float32 of shape key.shape + (count,)."""
    word = bits(key, (count + 1) // 2)
    radius_u = (_shift(word, 41).float() + 0.5) * 2.0**-23
    angle_u = ((word & 0x7FFFFF).float() + 0.5) * 2.0**-23
    radius, angle = torch.sqrt(-2.0 * torch.log(radius_u)), (2.0 * math.pi) * angle_u
    pair = torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), dim=-1)
    return pair.flatten(-2)[..., :count]


def keep_mask(key: Tensor, count: int, drop: float) -> Tensor:
    """Booleans that are False with probability `drop` (to 2^-16): shape key.shape + (count,). One hash serves four."""
    lanes = bits(key, (count + 3) // 4).view(torch.int16)  # signed: uniform on −32768..32767
    return (lanes >= round(drop * 65536) - 32768)[..., :count]


def integers(key: Tensor, count: int, high: int) -> Tensor:
    """`count` integers in [0, high) for each key: int64. The modulo's bias is below high/2^62."""
    return _shift(bits(key, count), 2) % high


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
