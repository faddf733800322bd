"""`genatt plan`: the parts put together, the verdict, and what to change where it does not fit."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console

from data_pipeline.errors import GenattError
from genatt_dist import config as configuration
from genatt_dist.config import RunConfig
from genatt_dist.embedding.planner import bytes_of
from genatt_dist.plan import layout
from genatt_dist.plan.cost import Cost, cost
from genatt_dist.plan.dense import Dense, dense, feature_ids, lookup_ids, train_trace
from genatt_dist.plan.hardware import GIB, Hardware, hardware
from genatt_dist.plan.layout import Shard
from genatt_dist.plan.memory import Memory, Place, memory
from genatt_dist.plan.workload import Share, Workload, shares, workload

USED = 0.92  # of a device's memory that a plan may fill: its model is right to some 15 per cent at best


@dataclass(frozen=True)
class Cluster:
    """nodes × per_node ranks, each with `machine` and `limit` bytes of memory."""

    nodes: int
    per_node: int
    machine: Hardware
    limit: int

    @property
    def world_size(self) -> int:
        return self.nodes * self.per_node

    @staticmethod
    def of(nodes: int, per_node: int, gpu: str, gib: float | None = None) -> Cluster:
        """gib: memory of a rank in GiB; default: the device's, or for `cpu` this machine's, shared by the node's ranks.

        Raises GenattError for an unknown device, a number below 1, or no memory.
        """
        machine = hardware(gpu)
        if gib is not None and gib <= 0:
            raise GenattError(f"--memory {gib:g}: a rank has some; give its GiB, or leave it out for the device's own")
        if nodes < 1 or per_node < 1:
            raise GenattError(f"--nodes {nodes} --gpus-per-node {per_node}: both have to be at least 1")
        own = machine.memory or psutil.virtual_memory().total // per_node
        return Cluster(nodes, per_node, machine, own if gib is None else int(gib * GIB))


@dataclass(frozen=True)
class Change:
    """What could be changed, and what the fullest rank would take then. Later ones build on those before."""

    override: str
    bytes: int
    fits: bool


@dataclass(frozen=True)
class Plan:
    """What one configuration would take on one cluster. changes: empty where it fits."""

    config: RunConfig
    cluster: Cluster
    load: Workload
    heaviest: Share
    sizes: Dense
    shards: tuple[Shard, ...]
    memory: Memory
    cost: Cost
    changes: tuple[Change, ...] = ()

    @property
    def place(self) -> Place:
        return "host" if self.cluster.machine.device == "cpu" else "device"

    @property
    def bytes(self) -> int:
        return self.memory.peak(self.place)

    @cached_property
    def fits(self) -> bool:
        return self.bytes <= USED * self.cluster.limit

    def as_json(self) -> dict[str, Any]:
        """Everything, for other programs. Sizes in bytes, times in seconds."""
        machine = self.cluster.machine
        return {
            "model": "an estimate: no rank was started",
            "nodes": self.cluster.nodes,
            "gpus_per_node": self.cluster.per_node,
            "world_size": self.cluster.world_size,
            "hardware": asdict(machine),
            "data": asdict(self.load),
            "fits": self.fits,
            "memory": {
                "limit": self.cluster.limit,
                "peak": self.bytes,
                "host_peak": self.memory.peak("host"),
                "parts": self.memory.as_json(),
            },
            "parameters": asdict(self.sizes),
            "heaviest_batch": {"sequences": self.heaviest.sequences, "length": self.heaviest.length},
            "step": {
                "seconds": self.cost.total,
                "parts": self.cost.seconds,
                "tokens": self.cost.tokens,
                "tokens_per_second": self.cost.tokens / self.cost.total,
            },
            "tables": [asdict(shard) for shard in self.shards],
            "changes": [asdict(change) for change in self.changes],
            "config": self.config.model_dump(mode="json"),
        }


def plan(
    config: RunConfig, cluster: Cluster, items: int | None = None, length: float | None = None, advise: bool = True
) -> Plan:
    """The plan of a configuration; `items` and `length` stand in for data that is not there yet.

    Raises GenattError: no data and no `items`, a combination that the device cannot run, fewer sequences than ranks.
    """
    load = workload(config, items, length)
    found = _plan(config, cluster, load)
    return replace(found, changes=tuple(_changes(found))) if advise and not found.fits else found


def command(
    config: RunConfig,
    settings: dict[str, Any],
    items: int | None,
    length: float | None,
    as_json: str | None,
    out: Path | None,
    console: Console,
) -> None:
    """The verb: shown on the console (unless JSON goes there), written where asked. settings: of `Cluster.of`."""
    from genatt_dist.plan.draw import draw
    from genatt_dist.plan.show import show

    if length is not None and items is None:
        raise GenattError(f"--length {length:g} without --items: the manifest says how long histories are; drop it")
    found = plan(config, Cluster.of(**settings), items, length)
    text = json.dumps(found.as_json(), indent=2)
    try:
        if as_json == "-":
            print(text)
        else:
            show(found, console)
            if as_json:
                Path(as_json).write_text(text + "\n")
        if out:
            out.write_text(draw(found))
    except OSError as error:
        raise GenattError(
            f"cannot write {error.filename}: {error.strerror}; name a file in a directory that exists"
        ) from None


def _plan(config: RunConfig, cluster: Cluster, load: Workload) -> Plan:
    world_size, device = cluster.world_size, cluster.machine.device
    if config.training.batch_sequences < world_size:
        raise GenattError(
            f"training.batch_sequences={config.training.batch_sequences} for {world_size} ranks: every rank needs a "
            f"sequence; set training.batch_sequences to at least {world_size}"
        )
    tables = layout.specs(config, load)
    shards = layout.shards(tables, config, world_size, cluster.per_node, device, _planner_limit(cluster, config, load))
    sizes = dense(config, load.num_items, load.feature_rows)
    heaviest, average = shares(config, load, world_size)
    rows = layout.item_rows(shards) if shards else load.num_items + 1
    in_batch = config.loss.kind == "sampled" and config.loss.proposal == "in_batch"
    gathered = world_size if in_batch or (shards and config.loss.kind == "full") else 1
    traces = {
        one: train_trace(config, load.num_items, rows, one, device, gathered, load.features)
        for one in {heaviest, average}
    }
    held = _held(config, tables, shards)
    ids = lookup_ids(config, load.num_items, heaviest, gathered) + feature_ids(config, heaviest, load.features)
    needed = memory(
        config,
        cluster.machine,
        load,
        heaviest,
        sizes,
        traces[heaviest],
        *held,
        shard_rows=rows if shards else 0,
        gradient_bytes=layout.gradient_bytes(shards),
        ids=ids,
        world_size=world_size,
        local=cluster.per_node,
    )
    spent = cost(config, cluster.machine, sizes, traces[average], average, ids, world_size, cluster.per_node)
    return Plan(config, cluster, load, heaviest, sizes, tuple(shards), needed, spent)


def _planner_limit(cluster: Cluster, config: RunConfig, load: Workload) -> int:
    """What TorchRec's planner is told a rank has: never so little that it refuses, because the verdict is ours."""
    whole = sum(sum(bytes_of(spec, config.table)) for spec in layout.specs(config, load))
    return max(cluster.limit, 4 * whole)


def _held(config: RunConfig, tables: list[Any], shards: list[Shard]) -> tuple[int, int]:
    """Bytes of rows and of optimizer state on the rank that holds most."""
    by_rank: dict[int, tuple[float, float]] = {}
    for shard in shards:
        spec = next(spec for spec in tables if spec.name == shard.table)
        rows, state = bytes_of(spec, config.table)
        share = shard.rows * shard.columns / (spec.rows * spec.width)
        before = by_rank.get(shard.rank, (0.0, 0.0))
        by_rank[shard.rank] = before[0] + rows * share, before[1] + state * share
    most = max(by_rank.values(), key=sum, default=(0.0, 0.0))
    return round(most[0]), round(most[1])


def _changes(found: Plan) -> list[Change]:
    """Overrides, one after the other, until it fits: those that cost no accuracy first."""
    made, config, least = [], found.config, found.bytes
    for override in _CANDIDATES:
        said = override(config, found)
        if said is None:
            continue
        tree = config.model_dump(mode="json")
        for part in said.split():
            configuration.apply(tree, part)
        try:
            candidate = configuration.parse(tree, "plan")
            new = _plan(candidate, found.cluster, found.load.shortened(candidate.data.max_len))
        except GenattError:
            continue  # not with the rest of this configuration
        if new.bytes > 0.98 * least:
            continue
        config, least = candidate, new.bytes
        made.append(Change(said, new.bytes, new.fits))
        if new.fits:
            return made
    more = replace(found.cluster, nodes=2 * found.cluster.nodes)
    try:
        new = _plan(config, more, found.load.shortened(config.data.max_len))
        made.append(Change(f"--nodes {more.nodes}", new.bytes, new.fits))
    except GenattError:
        pass
    return made


def _scored(config: RunConfig, _: Plan) -> str | None:
    chunk = config.evaluation.chunk_items
    return f"evaluation.chunk_items={max(1024, chunk // 8)}" if chunk > 8192 else None


def _rows(config: RunConfig, found: Plan) -> str | None:
    if config.table.kind != "sharded" or config.table.precision != "fp32":
        return None
    return f"table.precision={'fp16' if found.cluster.machine.device == 'cpu' else 'bf16'}"


def _stage(config: RunConfig, _: Plan) -> str | None:
    return f"training.zero_stage={config.training.zero_stage + 1}" if config.training.zero_stage < 3 else None


def _fewer(config: RunConfig, found: Plan) -> str | None:
    fewer = max(found.cluster.world_size, config.training.batch_sequences // 4)
    return f"training.batch_sequences={fewer}" if fewer < config.training.batch_sequences else None


_CANDIDATES: tuple[Callable[[RunConfig, Plan], str | None], ...] = (
    lambda config, _: "training.checkpoint.background=false" if config.training.checkpoint.background else None,
    _scored,
    lambda config, found: "table.kind=sharded" if config.table.kind == "replicated" and not found.shards else None,
    lambda config, _: (
        "table.optimizer=rowwise_adagrad"
        if config.table.kind == "sharded" and config.table.optimizer != "rowwise_adagrad"
        else None
    ),
    _stage,
    lambda config, _: (
        f"training.precision=bf16 training.zero_stage={max(1, config.training.zero_stage)}"
        if config.training.precision == "fp32"
        else None
    ),
    _stage,
    _rows,
    lambda config, _: "loss.chunk_tokens=32" if config.loss.kind == "full" else None,
    lambda config, _: "loss.kind=sampled" if config.loss.kind == "full" else None,
    _fewer,
    _fewer,
    lambda config, _: f"data.max_len={config.data.max_len // 2}" if config.data.max_len > 1 else None,
)
