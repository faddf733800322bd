"""`prepare` without Ray, in this process: the same stages in milliseconds, so that hypothesis can try many logs."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa

from data_pipeline import prepare as module
from data_pipeline.config import PrepareConfig
from data_pipeline.format import Manifest


def prepare(config: PrepareConfig) -> Manifest:
    """`data_pipeline.prepare.prepare`, silent, each task run where it is called."""
    with without_ray():
        return module.prepare(config, progress=False)


@contextmanager
def without_ray() -> Iterator[None]:
    """Everything `data_pipeline.prepare` has of Ray, replaced."""
    memory = mock.Mock(**{"use.return_value": None})
    spill = mock.Mock(**{"bytes.return_value": None})
    with mock.patch.multiple(
        module,
        ray=_Ray,
        local_ray=lambda *_: nullcontext(0.0),
        numbered=lambda column, count: _Blocks(column, count),
        outputs=lambda blocks, _: ((block, block.num_rows, block.nbytes) for block in blocks),
        results=lambda refs, _: enumerate(refs),
        run=lambda start, count, _: ((number, start(number)) for number in range(count)),
        value_of=lambda ref, _: ref,
        MemorySampler=lambda: nullcontext(memory),
        SpillCounter=lambda: spill,
    ):
        yield


class _Ray:
    ObjectRef = Any

    @staticmethod
    def put(value: Any) -> Any:
        return _read_only(copy.deepcopy(value))  # who puts it there may change it afterwards

    @staticmethod
    def remote(function: Callable[..., Any]) -> "_Task":
        return _Task(function)


@dataclass
class _Task:
    function: Callable[..., Any]

    def options(self, **_: Any) -> "_Task":
        return self

    def remote(self, *arguments: Any) -> Any:
        return _read_only(self.function(*arguments))


@dataclass
class _Blocks:
    column: str
    count: int

    def map_batches(self, function: Callable[..., Any], fn_kwargs: dict[str, Any], **_: Any) -> Iterator[pa.Table]:
        for number in range(self.count):
            yield from function(pa.table({self.column: [number]}), **fn_kwargs)


def _read_only(value: Any) -> Any:
    """Arrays out of Ray's object store cannot be written to."""
    for one in value if isinstance(value, tuple) else (value,):
        if isinstance(one, np.ndarray):
            one.setflags(write=False)
    return value
