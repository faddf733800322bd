"""What one forward and backward pass allocates, computes and moves, found by running the model itself on meta tensors.

The product's own `DenseModel` runs with shapes and no numbers, so that what is planned is what is trained: no formula
of activations stands here that a change of the model could leave behind. A dispatch mode sees every operation, counts
its floating-point operations and bytes, and follows the life of each storage: the largest sum of living bytes is the
peak. What an operation allocates and frees inside its own kernel is not seen, but for those in `_SCRATCH`.

Three operations ask for numbers, and meta tensors have none. The caller says what they would give: how many sequences
reach each position (`bincount`), which share of tokens is picked (`nonzero`), and which kernel attention takes.

Legend: B sequences, N real tokens, n width.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

_ATEN = torch.ops.aten
# Bytes that a kernel takes for itself, as a multiple of its first operand: e^(x − max) of a log-sum-exp, for example.
_SCRATCH = {_ATEN.logsumexp: 1.0, _ATEN.sort: 2.0, _ATEN.argsort: 2.0}
_SAME = {_ATEN.addmm_: _ATEN.addmm, _ATEN.baddbmm_: _ATEN.baddbmm}  # what torch counts under another name


@dataclass
class Work:
    """Operations of one kind: how many, their floating-point operations in matrix products, bytes read and written."""

    calls: int = 0
    flops: float = 0.0
    bytes: float = 0.0

    def add(self, flops: float, moved: float) -> None:
        self.calls, self.flops, self.bytes = self.calls + 1, self.flops + flops, self.bytes + moved


@dataclass
class Trace:
    """What was seen. Bytes count what lives beside parameters, gradients included.

    peak_bytes: most at one time. saved_bytes: when the forward pass has ended, that is, what waits for the backward.
    peak_gradient_bytes: part of the peak that is gradients of parameters. Work by kind: products of matrices
    (`matmul`), the loop of the recurrence, everything else.
    """

    peak_bytes: int = 0
    saved_bytes: int = 0
    work: dict[str, Work] = field(default_factory=lambda: {name: Work() for name in ("matmul", "recurrence", "other")})

    @property
    def flops(self) -> float:
        return sum(work.flops for work in self.work.values())


class Tracer(TorchDispatchMode):
    """Sees operations on meta tensors; a context.

    lengths: of the sequences, for `bincount`. picked: share of entries that are true, for `nonzero`. attention: the
    number of torch's SDPBackend for (query, mask or None).
    """

    def __init__(
        self, lengths: list[int], picked: float = 1.0, attention: Callable[[Tensor, Tensor | None], int] = lambda *_: 0
    ) -> None:
        super().__init__()
        self.trace, self.recurrent = Trace(), False
        self._lengths, self._picked, self._attention = lengths, picked, attention
        self._live = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()
        self._counts: weakref.WeakKeyDictionary[Any, list[int]] = weakref.WeakKeyDictionary()
        self._finalizers: list[weakref.finalize[Any, Any]] = []

    def forward_ended(self) -> None:
        self.trace.saved_bytes = self._live

    def ignore(self, tensors: Iterator[Tensor]) -> None:
        """These are counted elsewhere: parameters."""
        for tensor in tensors:
            self._known.add(tensor.untyped_storage())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = self._answer(func, args)
        out = func(*args, **(kwargs or {})) if out is None else out
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        outputs = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        fresh = [tensor for tensor in outputs if tensor.untyped_storage() not in self._known]
        scratch = int(_SCRATCH.get(func.overloadpacket, 0) * _bytes(inputs[:1]))
        for tensor in fresh:
            self._follow(tensor.untyped_storage())
        self.trace.peak_bytes = max(self.trace.peak_bytes, self._live + scratch)
        if fresh or func._schema.is_mutable:  # a view costs nothing
            self._count(func, args, kwargs or {}, out, _bytes(inputs) + _bytes(fresh) + 2 * scratch)
        return out

    def _answer(self, func: Any, args: Any) -> Any:
        """What an operation that needs numbers would give; None for all others."""
        if func is _ATEN.nonzero.default:
            return args[0].new_empty((round(args[0].numel() * self._picked), args[0].ndim), dtype=torch.int64)
        if func is _ATEN.bincount.default:
            counts = [sum(length > place for length in self._lengths) for place in range(max(self._lengths))]
            out = args[0].new_empty(len(counts), dtype=torch.int64)
            self._counts[out.untyped_storage()] = counts
            return out
        if func is _ATEN._to_copy.default and args[0].untyped_storage() in self._counts:
            return torch.tensor(self._counts[args[0].untyped_storage()])
        if func is _ATEN._fused_sdp_choice.default:
            return self._attention(args[0], args[3] if len(args) > 3 else None)
        return None

    def _follow(self, storage: Any) -> None:
        size = storage.nbytes() if storage.device.type == "meta" else 0
        self._live += size
        self._known.add(storage)
        weakref.finalize(storage, self._freed, size).atexit = False

    def _freed(self, size: int) -> None:
        self._live -= size

    def _count(self, func: Any, args: Any, kwargs: Any, out: Any, moved: float) -> None:
        packet = _SAME.get(func.overloadpacket, func.overloadpacket)
        flops = float(flop_registry[packet](*args, **kwargs, out_val=out)) if packet in flop_registry else 0.0
        kind = "recurrence" if self.recurrent else "matmul" if flops else "other"
        self.trace.work[kind].add(flops, moved)


@contextmanager
def recurrence(tracer: Tracer, module: nn.Module | None) -> Iterator[None]:
    """Counts what happens inside this module, forward and backward, as the recurrence."""
    if module is None:
        yield
        return

    def flag(value: bool) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            tracer.recurrent = value

        return hook

    hooks = [
        module.register_forward_pre_hook(flag(True)),
        module.register_forward_hook(flag(False)),
        module.register_full_backward_pre_hook(flag(True)),
        module.register_full_backward_hook(flag(False)),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _bytes(tensors: list[Tensor]) -> float:
    return float(sum(math.prod(tensor.shape) * tensor.element_size() for tensor in tensors))
