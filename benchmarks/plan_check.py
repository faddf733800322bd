"""Does `genatt plan` tell the truth? Trains different configurations on ranks of this machine and compares.

    python -m benchmarks.plan_check --out benchmarks/results/plan_check.json

The cases of `calibration` were at hand while the plan's two constants (heap holes, process) were chosen; those `held
out` were added afterwards and nothing was changed for them, so the verdict is theirs. Runs of one case differ by some
per cent, so each is measured `--repeats` times and the median counts.

Each case is trained for some steps in processes of its own (launched as a worker is: its threads, its allocator) on
batches whose windows are all `max_len` long, which is what the plan's memory assumes; the ids follow a power law. A
rank's memory is the peak of its resident set, the pages of files (libraries) divided by the ranks that map them: the
kernel keeps that peak itself, so that no sample can miss it, and no neighbour who maps them too changes it. Freed
blocks stay with the process (the workers' malloc settings), so the peak holds what the allocator could not use again.
Checkpoints and evaluation are not run, and the plan is asked for what stays and for a step alone. Step times are
compared too, for information: the CPU's constants are of no particular machine.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from genatt_dist import config as configuration
from genatt_dist.config import RunConfig

TOLERANCE = 0.15
KINDS = ("calibration", "held out")
VERSIONS = ("torch", "deepspeed", "torchrec", "fbgemm-gpu-cpu")
_SECONDS = 900.0  # that one case may take
NOTES = (
    "The plan's constants come from the calibration cases: heap holes from them at full size, process and libraries "
    "from them at --scale 0.001. No held-out case had been run at full size when they were set.",
    "Before that the held-out cases were run once at --scale 0.002 to see that they run. Three of the four took 9 to "
    "14 % more than planned: at that size a rank is a bare process, and that had grown since it was measured, so it "
    "was measured again, on the calibration cases alone.",
)


@dataclass(frozen=True)
class Case:
    """A configuration, its catalogue, and the ranks it is trained on. kind: one of `KINDS`."""

    kind: str
    name: str
    items: int
    ranks: int
    sections: dict[str, Any]

    @property
    def config(self) -> RunConfig:
        sections = {"data": {"path": "unused"}, "training": {}} | self.sections
        sections["data"] = {"path": "unused"} | sections["data"]
        sections["training"] = {"checkpoint": {"background": False}} | sections["training"]
        return configuration.parse(sections | {"world_size": self.ranks}, self.name)


def cases(scale: float = 1.0) -> tuple[Case, ...]:
    """They differ in what fills the memory; `scale` shrinks catalogues and batches."""

    def some(count: int) -> int:
        return max(2, round(count * scale))

    return (
        Case(
            "calibration",
            "D-GenAtt, full softmax, replicated 100k items, 1 rank",
            some(100_000),
            1,
            {
                "data": {"max_len": 50},
                "model": {"attention": {"type": "diffusion"}},
                "training": {"batch_sequences": some(64)},
            },
        ),
        Case(
            "calibration",
            "V-GenAtt K=4, sampled, sharded 5M items, 2 ranks",
            some(5_000_000),
            2,
            {
                "data": {"max_len": 50},
                "model": {"attention": {"type": "variational", "train_samples": 4}},
                "table": {"kind": "sharded"},
                "loss": {"kind": "sampled", "num_negatives": 256},
                "training": {"batch_sequences": some(128)},
            },
        ),
        Case(
            "calibration",
            "dot product, long sequences, bce, replicated 200k items, ZeRO-2, 2 ranks",
            some(200_000),
            2,
            {
                "data": {"max_len": 400},
                "model": {"attention": {"type": "dot_product"}, "num_heads": 2},
                "loss": {"kind": "bce"},
                "training": {"batch_sequences": some(64), "zero_stage": 2},
            },
        ),
        Case(
            "calibration",
            "D-GenAtt, full softmax, sharded 1M items, adagrad, 2 ranks",
            some(1_000_000),
            2,
            {
                "data": {"max_len": 50},
                "model": {"attention": {"type": "diffusion"}},
                "table": {"kind": "sharded", "optimizer": "adagrad"},
                "training": {"batch_sequences": some(16)},
            },
        ),
        Case(
            "held out",
            "D-GenAtt, sampled, sharded 10M items x 32 fp16, 2 ranks",
            some(10_000_000),
            2,
            {
                "data": {"max_len": 50},
                "model": {"hidden_size": 32, "attention": {"type": "diffusion"}},
                "table": {"kind": "sharded", "precision": "fp16"},
                "loss": {"kind": "sampled", "num_negatives": 1024},
                "training": {"batch_sequences": some(128)},
            },
        ),
        Case(
            "held out",
            "dot product, 4 blocks of 128, full softmax, replicated 50k items, ZeRO-3, 2 ranks",
            some(50_000),
            2,
            {
                "data": {"max_len": 100},
                "model": {
                    "hidden_size": 128,
                    "num_blocks": 4,
                    "num_heads": 4,
                    "attention": {"type": "dot_product"},
                },
                "training": {"batch_sequences": some(64), "zero_stage": 3},
            },
        ),
        Case(
            "held out",
            "hybrid V-GenAtt, gbce with 64 own negatives, windows of 200, replicated 300k items, 1 rank",
            some(300_000),
            1,
            {
                "data": {"max_len": 200},
                "model": {"attention": {"type": "hybrid", "generator": {"type": "variational"}}},
                "loss": {"kind": "gbce", "num_negatives": 64},
                "training": {"batch_sequences": some(32)},
            },
        ),
        Case(
            "held out",
            "dot product, full softmax, sharded 500k items, sgd, 2 ranks",
            some(500_000),
            2,
            {
                "data": {"max_len": 50},
                "model": {"attention": {"type": "dot_product"}},
                "table": {"kind": "sharded", "optimizer": "sgd"},
                "training": {"batch_sequences": some(32)},
            },
        ),
    )


def measure(case: Case, steps: int) -> list[dict[str, float]]:
    """Train the case; what each rank held and how long its steps took."""
    from genatt_dist.launch.launchers import single_process, worker_environment

    base = worker_environment(os.environ, case.ranks) | single_process() | {"DS_ACCELERATOR": "cpu"}
    base |= {"OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": str(case.ranks), "WORLD_SIZE": str(case.ranks)}
    asked = json.dumps({"case": asdict(case), "steps": steps})
    command = [sys.executable, "-m", "benchmarks.plan_check", "--rank-of", asked]
    processes = [
        subprocess.Popen(
            command, env=base | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, stdout=subprocess.PIPE, text=True
        )
        for rank in range(case.ranks)
    ]
    try:
        lines = [process.communicate(timeout=_SECONDS)[0].strip().splitlines() for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, said in zip(processes, lines, strict=True):
        if process.returncode or not said:
            raise RuntimeError(f"a rank of {case.name!r} ended with exit code {process.returncode}; it says why above")
    return [json.loads(said[-1]) for said in lines]


def compare(case: Case, steps: int, repeats: int) -> dict[str, Any]:
    """One row of the result: the median of `repeats` runs, each with its fullest rank."""
    from genatt_dist.plan.run import Cluster, plan

    found = plan(case.config, Cluster.of(1, case.ranks, "cpu"), items=case.items, advise=False)
    runs = [measure(case, steps) for _ in range(repeats)]
    peaks = [max(rank["peak"] for rank in ranks) for ranks in runs]
    measured, predicted = round(statistics.median(peaks)), found.memory.training("host")
    made, seconds = (
        statistics.median(max(rank[name] for rank in ranks) for ranks in runs) for name in ("made", "seconds")
    )
    parts = {part.name: part.bytes for part in found.memory.parts if part.phase in ("always", "step")}
    return {
        "kind": case.kind,
        "case": case.name,
        "items": case.items,
        "ranks": case.ranks,
        "predicted_bytes": predicted,
        "measured_bytes": measured,
        "measured_runs": peaks,
        "ratio": round(predicted / measured, 4),
        "predicted_parts": parts,
        "measured_made": round(made),
        "predicted_step_seconds": round(found.cost.total, 4),
        "measured_step_seconds": round(seconds, 4),
        "sections": case.sections,
    }


def main() -> int:
    """Compare, print and write; exit code 0."""
    parser = argparse.ArgumentParser(description="Compare what `genatt plan` says with runs on this machine.")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=3, help="runs of a case; the median counts")
    parser.add_argument("--scale", type=float, default=1.0, help="of catalogues and batches")
    parser.add_argument("--only", type=int, nargs="*", help="numbers of cases, from 0")
    parser.add_argument("--rank-of", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank_of:
        asked = json.loads(arguments.rank_of)
        print(json.dumps(_rank(Case(**asked["case"]), asked["steps"])))
        return 0
    if arguments.out is None:
        parser.error("--out is missing: name the JSON file to write")
    console, rows = Console(stderr=True), []
    for number, case in enumerate(cases(arguments.scale)):
        if arguments.only is not None and number not in arguments.only:
            continue
        row = compare(case, arguments.steps, arguments.repeats)
        rows.append(row)
        console.print(
            f"{row['kind']}: {row['case']}: predicted {row['predicted_bytes'] / 2**20:,.0f} MiB, measured "
            f"{row['measured_bytes'] / 2**20:,.0f} MiB (×{row['ratio']:.3f}); step {row['predicted_step_seconds']:.2f} "
            f"s, measured {row['measured_step_seconds']:.2f} s",
            highlight=False,
        )
    judgements = {kind: _verdict([row for row in rows if row["kind"] == kind]) for kind in KINDS}
    verdict = {kind: judged for kind, judged in judgements.items() if judged}
    result = {
        "command": " ".join(["python -m benchmarks.plan_check", *sys.argv[1:]]),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in VERSIONS},
        "verdict": verdict,
        "notes": NOTES,
        "rows": rows,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    for kind, judged in verdict.items():
        console.print(
            f"{kind}: largest error {judged['value']:.1%} of {judged['cases']} cases (target ≤ {TOLERANCE:.0%}): "
            f"{'met' if judged['met'] else 'missed'}"
        )
    return 0


def _verdict(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The largest error of some cases; empty for none."""
    if not rows:
        return {}
    worst = max(abs(row["ratio"] - 1) for row in rows)
    return {"value": round(worst, 4), "target": TOLERANCE, "met": worst <= TOLERANCE, "cases": len(rows)}


def _rank(case: Case, steps: int) -> dict[str, float]:
    """The life of one rank: what a worker makes, and some steps of it."""
    import torch
    import torch._dynamo
    import torch.distributed as dist

    from genatt_dist.data.batches import Batch
    from genatt_dist.loss.objective import Candidature
    from genatt_dist.model.jagged import Jagged
    from genatt_dist.training.engine import Engine, init_process_group, sum_over_ranks
    from genatt_dist.training.step import DenseModel, JointStep
    from genatt_dist.training.train import train  # noqa: F401  what a worker has loaded

    config, device = case.config, torch.device("cpu")
    init_process_group(device)
    torch.manual_seed(config.training.seed)
    table = None
    if config.table.kind == "sharded":
        from genatt_dist.embedding.sharded import ShardedTable

        rate, seed = config.table_learning_rate, config.training.seed
        table = ShardedTable(case.items, config.model.hidden_size, config.table, rate, seed, device)
    engine = Engine(DenseModel(config, case.items), config.training)
    popularity = torch.arange(1, case.items + 1, dtype=torch.float64).reciprocal_()
    candidature = Candidature(config.loss, case.items, popularity, device)
    step = JointStep(config, engine, candidature, table, case.ranks, sum_over_ranks)
    made, rank = _peak_bytes(case.ranks), dist.get_rank()
    random = torch.Generator().manual_seed(rank)
    length, whole = config.data.max_len, config.training.batch_sequences
    size = whole // case.ranks
    layout = Jagged.of(torch.full((size,), length), length, size * length)
    seconds = []
    for number in range(steps):
        drawn = torch.rand(size * (length + 1), generator=random, dtype=torch.float64)
        items = (case.items**drawn).long().clamp_(1, case.items)  # P(id) ∝ 1/id
        window_B = torch.arange(size) + whole * number + size * rank
        batch = Batch(items, layout, window_B, None, whole * length, whole * length, whole)
        dist.barrier()
        begun = time.perf_counter()
        step([batch], number, 1.0)
        seconds.append(time.perf_counter() - begun)
    peak = _peak_bytes(case.ranks)
    dist.barrier()
    dist.destroy_process_group()
    return {"peak": peak, "made": made, "seconds": statistics.median(seconds[1:] or seconds)}


def _peak_bytes(ranks: int) -> int:
    """Resident at most: anonymous pages, and this rank's part of the mapped files."""
    status = Path("/proc/self/status").read_text()

    def of(name: str) -> int:
        return 1024 * int(status.partition(f"\n{name}:")[2].split()[0])

    return of("VmHWM") - of("RssFile") + of("RssFile") // ranks


if __name__ == "__main__":
    sys.exit(main())
