"""Memory of the fullest rank, part by part, in bytes.

What lies there always, and what comes and goes with a phase (training step, evaluation, checkpoint). Sizes of tensors
are exact where they follow from the configuration. What DeepSpeed and TorchRec allocate beside them was read in their
code (0.19, 1.8) and checked by counting living storages; what is assumed is called so. The peak is all that stays plus
the largest phase.

Legend: P dense parameters, W ranks, V rows of this rank, D width, N ids of a lookup.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal

from genatt_dist.config import RunConfig
from genatt_dist.data.ahead import BATCHES_AHEAD
from genatt_dist.plan.dense import Dense, targets
from genatt_dist.plan.hardware import Hardware
from genatt_dist.plan.trace import Trace
from genatt_dist.plan.workload import Share, Workload
from genatt_dist.training.engine import reduce_bucket

Place = Literal["device", "host"]
Phase = Literal["always", "step", "evaluation", "checkpoint"]

# A rank's process with hardly a table or a model: interpreter, torch, DeepSpeed, and with a sharded table TorchRec; and
# the files they map, which ranks of a node share (`python -m benchmarks.plan_check --scale 0.001 --only 0 1 2 3`, with
# its data subtracted). With CUDA: assumed.
_PROCESS_BYTES = {
    ("cpu", False): 322 << 20,
    ("cpu", True): 363 << 20,
    ("cuda", False): 3 << 30,
    ("cuda", True): 3 << 30,
}
_LIBRARY_BYTES = 228 << 20
_BATCHES_HELD = BATCHES_AHEAD + 2  # put together before they are asked for, and in use
_EXCHANGES = 4  # copies of a lookup's rows in TorchRec: looked up, received, sorted back, and the gradients'
# Blocks that come and go in a step lie where there is room, and glibc, told to keep them, keeps the holes as well: as a
# share of those blocks 0.5 to 1.0 over cases and runs of benchmarks/plan_check.py, to which this number was fitted.
_HEAP_HOLES = 0.6


@dataclass(frozen=True)
class Part:
    """One thing that takes memory. note: how it was found."""

    name: str
    bytes: int
    place: Place
    phase: Phase
    note: str = ""


@dataclass(frozen=True)
class Memory:
    """All parts of the fullest rank."""

    parts: tuple[Part, ...]

    def peak(self, place: Place) -> int:
        """All that stays and the largest phase."""
        here = [part for part in self.parts if part.place == place]
        phases: dict[str, int] = {}
        for part in here:
            phases[part.phase] = phases.get(part.phase, 0) + part.bytes
        always = phases.pop("always", 0)
        return always + max(phases.values(), default=0)

    def training(self, place: Place) -> int:
        """All that stays and a training step: what a run holds that is not evaluated or saved."""
        return sum(part.bytes for part in self.parts if part.place == place and part.phase in ("always", "step"))

    def as_json(self) -> list[dict[str, object]]:
        return [asdict(part) for part in self.parts]


def memory(
    config: RunConfig,
    machine: Hardware,
    load: Workload,
    share: Share,
    sizes: Dense,
    trace: Trace,
    table_bytes: int,
    state_bytes: int,
    shard_rows: int,
    gradient_bytes: int,
    ids: int,
    world_size: int,
    local: int,
) -> Memory:
    """table_bytes, state_bytes: of this rank's parts of sharded tables. shard_rows: of the item table on this rank.
    gradient_bytes: of float32 gradients of sharded rows. ids: of one lookup. local: ranks of a node.
    """
    cpu = machine.device == "cpu"
    where: Place = "host" if cpu else "device"
    sharded, d = config.table.kind == "sharded", config.model.hidden_size
    process = _PROCESS_BYTES[machine.device, sharded] + _LIBRARY_BYTES // local
    found = "measured" if cpu else "assumed"
    parts = [Part("process", process, "host", "always", f"interpreter and libraries, {found}")]
    if not cpu:
        parts.append(Part("CUDA context", machine.base_bytes, "device", "always", "assumed"))
    if sharded:
        parts.append(Part("table rows", table_bytes, where, "always", "of the fullest rank, exact"))
        parts.append(Part("table optimizer", state_bytes, where, "always", f"{config.table.optimizer}, exact"))
    if managed := config.table.managed_collision:
        numbers = 2 if managed.policy == "distance_lfu" else 1
        size = (24 + 16 * numbers) * managed.rows + 8 * load.num_items
        parts.append(Part("map of items", size, where, "always", "managed collision, the same on every rank"))
    parts += [Part(name, size, where, phase, note) for name, size, phase, note in _zero(config, sizes, world_size)]
    vocabulary_parallel = sharded and config.loss.kind == "full"
    traced_gradients = sizes.total * _width(config) + (shard_rows * d * 4 if vocabulary_parallel else 0)
    activations = max(0, trace.peak_bytes - traced_gradients)
    parts.append(Part("activations", activations, where, "step", "forward and backward traced, without gradients"))
    if sharded:
        parts.append(
            Part("id exchange", _EXCHANGES * ids * d * 4, where, "step", "TorchRec's copies of looked-up rows")
        )
        if vocabulary_parallel:
            gathered = world_size * targets(config, share) * d * 4
            summed = gradient_bytes * (2 if config.training.accumulation_steps > 1 else 1)  # one and the next
            parts.append(Part("shard gradient", summed, where, "step", "float32, summed before the one update"))
            parts.append(
                Part("gathered states", 2 * gathered, where, "step", "of all ranks, and a copy while gathered")
            )
    passing = sum(part.bytes for part in parts if part.phase == "step")
    if cpu:
        parts.append(Part("heap holes", int(_HEAP_HOLES * passing), where, "step", "glibc keeps what was freed"))
    else:
        parts.append(Part("allocator", int(0.1 * passing), where, "step", "fragments of PyTorch's cache, assumed"))
    parts.append(Part("popularity", 8 * load.num_items, "host", "always", "training counts of all items"))
    if config.loss.kind == "sampled" and config.loss.proposal != "uniform":
        law = 12 * load.num_items
        parts.append(Part("law of the negatives", law, where, "always", "its sums (float64) and logarithms, all items"))
    read_ahead = min(config.data.prefetch_bytes, 4 * load.interactions) if load.interactions else 0
    parts.append(Part("read ahead", read_ahead, "host", "always", "items of row groups, at most data.prefetch_bytes"))
    batch = _BATCHES_HELD * 8 * (3 * share.tokens + 3 * share.sequences)
    parts.append(Part("batches", batch, "host", "always", "put together ahead"))
    parts += _evaluation(config, load, shard_rows, world_size, where)
    dense_state = 4 * sizes.total * (3 if config.training.optimizer == "adamw" else 1)
    parts.append(Part("dense snapshot", dense_state, "host", "checkpoint", "rank 0, while it is written"))
    if config.training.checkpoint.background:
        copied = table_bytes + state_bytes if sharded else 0
        parts.append(Part("table snapshot", copied, "host", "checkpoint", "copy of this rank's tables"))
        step = [part for part in parts if part.phase == "step" and part.place == "host"]
        parts += [Part(part.name, part.bytes, part.place, "checkpoint", "training goes on meanwhile") for part in step]
    return Memory(tuple(part for part in parts if part.bytes))


def _width(config: RunConfig) -> int:
    """Bytes of a dense parameter as the forward pass reads it."""
    return 2 if config.training.precision == "bf16" else 4


def _zero(config: RunConfig, sizes: Dense, world_size: int) -> list[tuple[str, int, Phase, str]]:
    """DeepSpeed's: parameters, fp32 master parts, moments, gradients, buckets."""
    stage, p, b, w = config.training.zero_stage, sizes.total, _width(config), world_size
    moments = 8 if config.training.optimizer == "adamw" else 0
    apart = w if stage else 1
    kept = p // (w if stage == 3 else 1)
    found: list[tuple[str, int, Phase, str]] = [
        ("dense parameters", b * kept, "always", f"{p:,} numbers" + (f" / {w}" if stage == 3 else "")),
        ("dense optimizer", moments * p // apart, "always", f"{config.training.optimizer}, ZeRO-{stage}"),
    ]
    if stage:
        found.append(("fp32 master parts", 4 * p // w, "always", f"ZeRO-{stage}"))
        found.append(("averaged gradients", 4 * p // w, "always" if stage == 3 else "step", f"ZeRO-{stage}, fp32"))
    if stage == 3:
        found.append(("gathered parameters", b * p if w > 1 else 0, "step", "at most all at one time"))
    found.append(("gradients", b * p, "step", "in the model's precision"))
    found.append(("reduce bucket", b * reduce_bucket(p), "always" if stage == 3 else "step", "a copy of the gradients"))
    return found


def _evaluation(config: RunConfig, load: Workload, shard_rows: int, world_size: int, where: Place) -> list[Part]:
    """Scores of one rank's users against a chunk of items, and the states of all ranks' users."""
    users, d = config.evaluation.batch_users, config.model.hidden_size
    rows = shard_rows if config.table.kind == "sharded" else load.num_items
    scores = users * min(config.evaluation.chunk_items, rows)
    parts = [
        Part("scores", 8 * scores, where, "evaluation", "users × chunk: float32 scores and four masks"),
        Part("encoder", 8 * 4 * users * config.data.max_len * d, where, "evaluation", "assumed: 8 states a token"),
    ]
    if config.table.kind == "sharded":
        asked = 2 * 4 * world_size * users * d
        parts.append(Part("asked states", asked, where, "evaluation", "of all ranks' users, and a copy while gathered"))
    return parts
