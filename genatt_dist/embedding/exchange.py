"""How ranks tell each other what a loss over the items of all ranks needs: tensors of unequal length gathered, sums
handed back, and rows of a shard read and added to by their place in the table.

Legend: N rows of this rank, G rows of all ranks one after the other, C targets of a chunk, W ranks, V rows of a shard.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


class Alone:
    """One rank that holds all rows: nothing is exchanged."""

    def gather(self, x_N: Tensor) -> Tensor:
        return x_N

    def scatter_sum(self, x_N: Tensor) -> Tensor:
        return x_N

    def sum(self, x: Tensor) -> Tensor:
        return x

    def part(self, x_N: Tensor) -> Tensor:
        return x_N

    def own(self, x_N: Tensor) -> Tensor:
        return x_N

    def normaliser(self, top_C1: Tensor, sum_C1: Tensor) -> tuple[Tensor, Tensor]:
        """See `Ranks.normaliser`."""
        return sum_C1, top_C1 + sum_C1.log()


@dataclass(frozen=True)
class Ranks:
    """All ranks of the process group; rank r has sizes[r] rows. All but `part` and `own` are collective calls."""

    sizes: list[int]
    rank: int

    @staticmethod
    def of(size: int, device: torch.device) -> Ranks:
        """Ask every rank how many rows it has. The answer comes to the host, as in every lookup of TorchRec's."""
        sizes = torch.empty(dist.get_world_size(), dtype=torch.int64, device=device)
        dist.all_gather_single(sizes, torch.tensor([size], device=device))
        return Ranks(sizes.tolist(), dist.get_rank())

    def gather(self, x_N: Tensor) -> Tensor:
        """Every rank's rows, one rank after the other: [G, …]."""
        most = max(self.sizes)
        padded = x_N.new_zeros((most, *x_N.shape[1:]))
        padded[: len(x_N)] = x_N
        whole = x_N.new_empty((len(self.sizes), *padded.shape))
        dist.all_gather_single(whole.flatten(0, 1), padded)
        return torch.cat([part[:size] for part, size in zip(whole, self.sizes, strict=True)])

    def scatter_sum(self, x_GD: Tensor) -> Tensor:
        """The sum over ranks of this rank's rows of `gather`'s result: [N, D]."""
        most = max(self.sizes)
        padded = x_GD.new_zeros((len(self.sizes), most, *x_GD.shape[1:]))
        for part, own in zip(padded, x_GD.split(self.sizes), strict=True):
            part[: len(own)] = own
        summed = torch.empty_like(padded[0])
        dist.reduce_scatter_single(summed, padded.flatten(0, 1))
        return summed[: self.sizes[self.rank]]

    def sum(self, x: Tensor) -> Tensor:
        """The sum over ranks, in place."""
        dist.all_reduce(x)
        return x

    def part(self, x_G: Tensor) -> Tensor:
        """This rank's rows of `gather`'s result, a view."""
        return x_G.split(self.sizes)[self.rank]

    def own(self, x_G: Tensor) -> Tensor:
        """The same with zeros at the other ranks' rows."""
        own_G = torch.zeros_like(x_G)
        self.part(own_G).copy_(self.part(x_G))
        return own_G

    def normaliser(self, top_C1: Tensor, sum_C1: Tensor) -> tuple[Tensor, Tensor]:
        """Σ_v exp(o_v) over the items of all ranks, from this rank's maximum m and Σ exp(o − m): what this rank's
        exp(o − m) are divided by to become probabilities, and the sum's logarithm.
        """
        pair_C2 = torch.cat((top_C1, sum_C1), 1)
        all_WC2 = pair_C2.new_empty((len(self.sizes), *pair_C2.shape))
        dist.all_gather_single(all_WC2.flatten(0, 1), pair_C2)
        tops_WC1, sums_WC1 = all_WC2.split(1, 2)
        highest_C1 = tops_WC1.amax(0)
        total_C1 = (sums_WC1 * (tops_WC1 - highest_C1).exp()).sum(0)
        return total_C1 * (highest_C1 - top_C1).exp(), highest_C1 + total_C1.log()


def gather_all(x_N: Tensor) -> Tensor:
    """The rows of all ranks of the process group, where there is one; else these."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return x_N
    return Ranks.of(len(x_N), x_N.device).gather(x_N)


def rows_at(x_VD: Tensor, place_N: Tensor) -> Tensor:
    """x[place_n], zero where the place lies outside of x (which may be empty): [N, D]."""
    if not len(x_VD):
        return x_VD.new_zeros((len(place_N), x_VD.shape[1]))
    return x_VD[place_N.clamp(0, len(x_VD) - 1)] * _inside(x_VD, place_N)


def add_rows_(x_VD: Tensor, place_N: Tensor, rows_ND: Tensor, alpha: float = 1.0) -> None:
    """x[place_n] += alpha · rows_n where the place lies inside of x; nothing comes to the host for it."""
    if len(x_VD):
        inside_ND = (rows_ND * _inside(x_VD, place_N)).to(x_VD.dtype)
        x_VD.index_add_(0, place_N.clamp(0, len(x_VD) - 1), inside_ND, alpha=alpha)


def _inside(x_VD: Tensor, place_N: Tensor) -> Tensor:
    return ((place_N >= 0) & (place_N < len(x_VD)))[:, None]
