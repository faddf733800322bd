"""The turns of the ingest benchmark: start a competitor, watch its memory, compare what both wrote."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.ingest.compare import difference
from benchmarks.ingest.server import S3Server
from data_pipeline import synthetic
from data_pipeline.memory import MemorySampler
from data_pipeline.storage import filesystem

BUCKET = "ingest"
LOG = f"s3://{BUCKET}/log"
SOURCE = f"{LOG}/interactions*.parquet"
MODULES = {"ours": "benchmarks.ingest.pipeline", "polars": "benchmarks.ingest.polars_reference"}
HOBBLES = ("POLARS_MAX_THREADS", "OMP_NUM_THREADS", "RAY_ADDRESS", "RAY_NUM_CPUS")  # of the caller's environment
RATIO_TARGET = 2.0
GROWTH_TARGET = 1.2
LINE_POINTS = 80  # of a memory line that is kept


@dataclass(frozen=True)
class Setting:
    """What is measured. rows: sizes; reference_rows: largest for the reference; limit: seconds for one competitor."""

    rows: tuple[int, ...]
    users: int
    items: int
    rounds: int
    cores: int
    rows_per_file: int
    rows_per_shard: int
    reference_rows: int
    object_store_bytes: int | None
    limit: float
    workdir: Path | None = None

    def options(self, rows: int) -> synthetic.Options:
        """Of the log with `rows` rows."""
        files = math.ceil(rows / self.rows_per_file)
        return synthetic.Options(users=self.users, items=self.items, rows=rows, files=files)

    def order(self, rows: int, number: int) -> tuple[str, ...]:
        """Who runs in round `number`, from 0: each round begins with the one that ended the last."""
        if rows > self.reference_rows:
            return ("ours",)
        return ("ours", "polars") if number % 2 == 0 else ("polars", "ours")


class MismatchError(Exception):
    """The two competitors did not write the same."""


def use_cores(count: int) -> int:
    """Keeps this process and all it starts on `count` cores; returns how many those are."""
    cores = sorted(os.sched_getaffinity(0))[:count]
    os.sched_setaffinity(0, cores)
    return len(cores)


def measure(setting: Setting) -> Iterator[dict[str, Any]]:
    """A row for each size and round. `MismatchError` as soon as results differ."""
    for rows in setting.rows:
        with S3Server() as server, _environment(server.environment):
            filesystem(LOG)[0].mkdir(BUCKET)
            synthetic.write_to(setting.options(rows), LOG)
            for number in range(setting.rounds):
                yield _round(setting, rows, number, server)


def _round(setting: Setting, rows: int, number: int, server: S3Server) -> dict[str, Any]:
    order = setting.order(rows, number)
    row: dict[str, Any] = {"rows": rows, "round": number + 1, "order": " ".join(order)}
    with tempfile.TemporaryDirectory(prefix="ingest-", dir=setting.workdir) as folder:
        for name in order:
            row[name] = _turn(name, rows, Path(folder) / name, setting, server)
        if len(order) == 2:
            counts = [(row[name]["rows_in"], row[name]["rows_out"]) for name in order]
            if counts[0] != counts[1]:
                raise MismatchError(f"rows in and out: {counts[0]} of {order[0]}, {counts[1]} of {order[1]}")
            if differs := difference(Path(folder) / "ours", Path(folder) / "polars"):
                raise MismatchError(differs)
            row["equal"] = True
            row["ratio"] = round(row["ours"]["seconds"] / row["polars"]["seconds"], 3)
    return row


def _turn(name: str, rows: int, out: Path, setting: Setting, server: S3Server) -> dict[str, Any]:
    """Runs one competitor and returns what it said, the memory it took, and what the server did for it."""
    shards = math.ceil(rows / setting.rows_per_shard)
    command = [sys.executable, "-m", MODULES[name], "--source", SOURCE, "--out", str(out), "--num-shards", str(shards)]
    if name == "ours":
        command += ["--num-cpus", str(setting.cores)]
        if setting.object_store_bytes is not None:
            command += ["--object-store-bytes", str(setting.object_store_bytes)]
    os.sync()  # what was written before is not this one's to write back
    load, before = os.getloadavg()[0], server.served()
    environment = {key: value for key, value in os.environ.items() if key not in HOBBLES}
    with tempfile.TemporaryFile("w+") as said, tempfile.TemporaryFile("w+") as wrong:
        process = subprocess.Popen(command, env=environment, stdout=said, stderr=wrong, start_new_session=True)
        with MemorySampler(root=process.pid) as sampler:
            try:
                code = process.wait(setting.limit)
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        said.seek(0), wrong.seek(0)
        if code:
            raise RuntimeError(f"{name} at {rows} rows ended with {code}: {wrong.read()[-2000:]}")
        result: dict[str, Any] = json.loads(said.read().splitlines()[-1])
    after, use = server.served(), sampler.use()
    served = {f"s3_{key}": round(after[key] - before[key], 2) for key in after}
    return result | {
        "peak_bytes": use.peak,
        "peak_by_role": use.roles,
        "measure": use.measure,
        "load_before": round(load, 2),
        "files": sum(1 for _ in out.rglob("*.parquet")),
        "bytes_written": sum(file.stat().st_size for file in out.rglob("*.parquet")),
        **served,
        "line": _thinned(use.line),
    }


@contextlib.contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def _thinned(line: Sequence[tuple[float, int]]) -> list[list[float]]:
    """(seconds, MiB) of at most `LINE_POINTS` points, the highest of those each stands for."""
    stride = math.ceil(len(line) / LINE_POINTS) or 1
    points = [max(line[at : at + stride], key=lambda point: point[1]) for at in range(0, len(line), stride)]
    return [[round(seconds, 1), round(size / 2**20)] for seconds, size in points]


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Medians of each size, and the verdicts: the ratio where there is one, the growth where there are two sizes."""
    sizes: dict[int, dict[str, Any]] = {}
    for size in sorted({row["rows"] for row in rows}):
        of_size = [row for row in rows if row["rows"] == size]
        medians: dict[str, Any] = {}
        for name in MODULES:
            turns = [row[name] for row in of_size if name in row]
            if turns:
                medians[f"{name}_seconds"] = round(statistics.median(turn["seconds"] for turn in turns), 3)
                medians[f"{name}_peak_bytes"] = max(turn["peak_bytes"] for turn in turns)
        starts = [row["ours"]["ray_start_seconds"] for row in of_size if "ours" in row]
        medians["ray_start_seconds"] = round(statistics.median(starts), 3)
        if "polars_seconds" in medians:
            medians["ratio"] = round(medians["ours_seconds"] / medians["polars_seconds"], 3)
        sizes[size] = medians
    smallest, largest = sizes[min(sizes)], sizes[max(sizes)]
    verdict: dict[str, Any] = {}
    if "ratio" in smallest:
        verdict["ratio"] = _judged(smallest["ratio"], RATIO_TARGET)
    if len(sizes) > 1:
        growth = largest["ours_peak_bytes"] / smallest["ours_peak_bytes"]
        verdict["peak_memory_growth"] = _judged(round(growth, 3), GROWTH_TARGET)
    return {"medians": {str(size): medians for size, medians in sizes.items()}, "verdict": verdict}


def _judged(value: float, target: float) -> dict[str, Any]:
    return {"value": value, "target": target, "met": value <= target}
