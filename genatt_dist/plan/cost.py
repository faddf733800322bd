"""Seconds of a training step: a roofline of the traced operations, and α–β times of what ranks tell each other.

Each kind of operations takes the longest of its floating-point operations over the reached peak and its bytes over the
reached bandwidth, plus a launch an operation. Collectives are rings inside a node and between nodes (Thakur et al.
2005); nothing is taken to overlap, so the sum is pessimistic where DeepSpeed or TorchRec hide an exchange.

Legend: P dense parameters, W ranks, L ranks of a node, N ids of a lookup, G tokens of the global batch, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from genatt_dist.config import RunConfig
from genatt_dist.plan.dense import Dense, targets
from genatt_dist.plan.hardware import Hardware
from genatt_dist.plan.trace import Trace
from genatt_dist.plan.workload import Share


class Collectives(Protocol):
    """Seconds of a collective over `world_size` ranks, by its bytes as `Link` counts them."""

    @property
    def world_size(self) -> int: ...

    def all_reduce(self, size: float) -> float: ...

    def all_gather(self, size: float) -> float: ...

    def all_to_all(self, size: float) -> float: ...


@dataclass(frozen=True)
class Link:
    """What a collective over all ranks meets: the slowest of its links."""

    machine: Hardware
    world_size: int
    local: int

    @property
    def _bandwidth(self) -> float:
        return self.machine.net_bandwidth if self.world_size > self.local else self.machine.node_bandwidth

    @property
    def _latency(self) -> float:
        return self.machine.net_latency if self.world_size > self.local else self.machine.node_latency

    def all_reduce(self, size: float) -> float:
        """2(W−1)/W of the bytes a rank; a tree's latency where it is small: 2 log₂ W."""
        if self.world_size == 1:
            return 0.0
        hops = 2 * (self.world_size - 1).bit_length()
        return hops * self._latency + 2 * (self.world_size - 1) / self.world_size * size / self._bandwidth

    def all_gather(self, size: float) -> float:
        """size: of what every rank has in the end. Also a reduce-scatter's."""
        return self.all_reduce(size) / 2

    def all_to_all(self, size: float) -> float:
        """size: of what a rank sends. A message to every other rank; those of its node go by the node's link."""
        if self.world_size == 1:
            return 0.0
        far = max(0, self.world_size - self.local) / self.world_size
        near = (min(self.local, self.world_size) - 1) / self.world_size
        seconds = size * near / self.machine.node_bandwidth + size * far / self.machine.net_bandwidth
        return seconds + self._latency * (self.world_size - 1).bit_length()


@dataclass(frozen=True)
class Cost:
    """Seconds of one update by name; tokens: of the global batches in it."""

    seconds: dict[str, float]
    tokens: float

    @property
    def total(self) -> float:
        return sum(self.seconds.values())


def cost(
    config: RunConfig,
    machine: Hardware,
    sizes: Dense,
    trace: Trace,
    share: Share,
    ids: int,
    world_size: int,
    local: int,
) -> Cost:
    """Of one update: `accumulation_steps` micro-batches, one dense update."""
    link, micro = Link(machine, world_size, local), config.training.accumulation_steps
    half, d = config.training.precision == "bf16", config.model.hidden_size
    peak = (machine.flops_bf16 if half else machine.flops_fp32) * machine.reached_flops
    bandwidth = machine.bandwidth * machine.reached_bandwidth
    seconds = {}
    for name, work in trace.work.items():
        launch = machine.recurrence_launch if name == "recurrence" else machine.launch
        seconds[f"compute: {name}"] = micro * (
            max(work.flops / peak, work.bytes / bandwidth if name != "matmul" or not work.flops else 0.0)
            + work.calls * launch
        )
    stage = config.training.zero_stage
    seconds["dense update"] = (
        4 * 7 * sizes.total / (world_size if stage else 1) / bandwidth + sizes.tensors * 4 * machine.launch
    )
    if config.table.kind == "sharded":
        seconds["table lookup and update"] = micro * (8 * ids * d * 4 / bandwidth + 60 * machine.launch)
    chunks = max(1, trace.work["matmul"].calls // 3)
    return Cost(seconds | exchanges(config, link, sizes, share, ids, chunks), share.tokens * world_size * micro)


def exchanges(
    config: RunConfig, link: Collectives, sizes: Dense, share: Share, ids: int, chunks: int
) -> dict[str, float]:
    """Seconds of one update in which ranks tell each other something, by what. chunks: of a full softmax."""
    half, d, micro = config.training.precision == "bf16", config.model.hidden_size, config.training.accumulation_steps
    stage, width = config.training.zero_stage, 2 if half else 4
    seconds = {"gradients over ranks": link.all_reduce(width * sizes.total)}
    if stage:
        seconds["parameters over ranks"] = link.all_gather(width * sizes.total) * (2 * micro if stage == 3 else 1)
    if config.table.kind == "sharded":
        rows = ids * d * 4
        seconds["ids over ranks"] = micro * link.all_to_all(8 * ids)
        seconds["rows over ranks"] = micro * 2 * link.all_to_all(rows)
        if config.loss.kind == "full":
            states = link.world_size * targets(config, share) * d * width
            seconds["states over ranks"] = micro * (link.all_gather(states) + link.all_gather(4 * states / width))
            seconds["sums over ranks"] = micro * chunks * link.all_gather(8 * link.world_size * 32)
    return seconds
