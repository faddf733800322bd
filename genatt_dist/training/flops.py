"""Floating-point operations of what runs, and how many a second this device can do: both of matrix products alone.

Operations are counted by torch while they run, backward and hand-written autograd functions included; the numbers they
compute stay the same. Attention counts all entries of a map, above the diagonal too, whichever kernel makes it. What
torch knows no count for counts as nothing, but for what is named here.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, flop_registry

_ATEN = torch.ops.aten
# Square matrices of the peak: large enough to keep the device busy, small enough to take a fraction of a second.
_PEAK_SIZE = {"cpu": 1024, "cuda": 4096}
_PEAK_SECONDS = 0.3
_PEAK_MOST_REPEATS = 50


def _rnn(input_shape: Any, weight_shapes: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """cuDNN's recurrence: every row meets every matrix of weights once."""
    rows = math.prod(input_shape[:-1])
    return sum(2 * rows * math.prod(shape) for shape in weight_shapes if len(shape) == 2)


def _rnn_backward(*args: Any, **kwargs: Any) -> int:
    """Gradients of the rows, and of the weights: a product of the forward's size each."""
    return 2 * _rnn(*args, **kwargs)


# What torch counts under another name, and what it has no count for.
_SAME = {
    _ATEN.addmm_: _ATEN.addmm,
    _ATEN.baddbmm_: _ATEN.baddbmm,
    _ATEN._scaled_dot_product_flash_attention_for_cpu: _ATEN._scaled_dot_product_flash_attention,
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: _ATEN._scaled_dot_product_flash_attention_backward,
}
_MORE = {_ATEN._cudnn_rnn: _rnn, _ATEN._cudnn_rnn_backward: _rnn_backward}


class Count:
    """What `counted` found: complete after its context."""

    flops = 0


@contextmanager
def counted() -> Iterator[Count]:
    """Counts the operations of the matrix products inside, of this rank. What runs is slower for it, and the same."""
    count = Count()
    counter = FlopCounterMode(display=False, custom_mapping=_MORE)
    counter.flop_registry |= {name: flop_registry[known] for name, known in _SAME.items()}
    with counter:
        yield count
    count.flops = int(counter.get_total_flops())


@torch.no_grad()
def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Most operations a second of one large matrix product, with this process's threads, in a fraction of a second."""
    size = _PEAK_SIZE[device.type]
    a, b = (torch.full((size, size), 1 / size, device=device, dtype=dtype) for _ in range(2))
    out = torch.mm(a, b)
    started, fastest = time.perf_counter(), math.inf
    for _ in range(_PEAK_MOST_REPEATS):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        before = time.perf_counter()
        torch.mm(a, b, out=out)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        now = time.perf_counter()
        fastest = min(fastest, now - before)
        if now - started > _PEAK_SECONDS:
            break
    return 2 * size**3 / fastest
