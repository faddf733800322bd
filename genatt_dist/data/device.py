"""What was put together in numpy, on the device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from genatt_dist.data.arrays import Items
from genatt_dist.data.features import Bags


class Read(NamedTuple):
    """Rows of a feature's table that positions read, on the device: see `features.Bags`."""

    row_K: Tensor
    first_N: Tensor


def read_on(bags: Mapping[str, Bags], device: torch.device) -> dict[str, Read]:
    """What the positions read of each feature."""
    return {name: Read(values_on(bag.row_K, device), values_on(bag.first_N, device)) for name, bag in bags.items()}


def ids_on(items: Items, device: torch.device) -> Tensor:
    """Dense ids as int64."""
    return values_on(items.astype(np.int64), device)


def values_on(values: npt.NDArray[np.int64], device: torch.device) -> Tensor:
    """The values; from pinned memory, so that the copy to a GPU does not stop the step."""
    tensor = torch.from_numpy(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
