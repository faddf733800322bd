"""`genatt` on a live cluster with a local S3, and the pipeline that the live tests submit."""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray_cluster import ROOT, Cluster

ML_100K = Path(__file__).parents[3] / "shared" / "data" / "ml-100k"
BUCKET = "jobs"
JOB_SECONDS = 600
# Every draw is keyed, so dropout and the noise of D-GenAtt stay on. A STRICT_SPREAD puts one rank on each node.
PIPELINE = {
    "prepare": {"source": f"s3://{BUCKET}/raw", "num_shards": 2, "name": "ml-100k"},
    "train": {
        "data": {"max_len": 20},
        "model": {
            "hidden_size": 16,
            "num_blocks": 1,
            "dropout": 0.2,
            "attention": {"type": "diffusion", "rank": 4, "latent_size": 6, "generator_size": 12, "diffusion_steps": 6},
        },
        "table": {"kind": "sharded", "learning_rate": 0.05},
        "loss": {"kind": "sampled", "num_negatives": 32},
        "training": {
            "epochs": 2,
            "batch_sequences": 24,
            "learning_rate": 0.005,
            "checkpoint_every": 7,
            "evaluate_every": 2,
        },
        "evaluation": {"batch_users": 256},
        "world_size": 2,
        "ray": {"placement": "STRICT_SPREAD", "max_failures": 3},
    },
    "evaluate": {"splits": ["test"]},
    "report": {},
}
LAST_STEP = 78  # of 39 batches an epoch
UNDISTURBED = "undisturbed"
_BEAT_SECONDS = 2.2  # a little more than between two beats
_RESUMED = re.compile(r"note: goes on from the checkpoint of step (\d+)")
KEYS = ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION")


def resumed_from(said: str) -> list[int]:
    """The checkpoints that a job said it went on from."""
    return [int(step) for step in _RESUMED.findall(said)]


@dataclass
class Live:
    """The cluster, its S3, and `genatt` for it."""

    cluster: Cluster
    s3: Any
    environment: dict[str, str]
    pipeline: Path

    def command(self, *words: object) -> list[str]:
        return [sys.executable, "-m", "genatt_dist.cli", *map(str, words)]

    def genatt(self, *words: object, seconds: float = JOB_SECONDS) -> subprocess.CompletedProcess[str]:
        """Runs the program to its end."""
        ended = subprocess.run(
            self.command(*words), env=self._variables(), cwd=ROOT, capture_output=True, text=True, timeout=seconds
        )
        assert "Traceback" not in ended.stderr, ended.stdout + ended.stderr
        return ended

    @contextmanager
    def submitting(self, run: str, *words: object) -> Iterator[subprocess.Popen[str]]:
        """`genatt submit pipeline`, which goes on while the block does what disturbs it."""
        process = subprocess.Popen(
            self.command(*self.submission(run), *words),
            env=self._variables(),
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()
            process.communicate()

    def submission(self, run: str) -> list[str]:
        """All runs share the shards of the first one."""
        shards = f"prepare.out={self.url(UNDISTURBED)}-shards"
        return ["submit", "pipeline", str(self.pipeline), shards, "--run", self.url(run), *self.passed]

    @property
    def passed(self) -> list[str]:
        """Options that give a job the credentials."""
        return [word for name in KEYS for word in ("--env", name)]

    def url(self, run: str) -> str:
        return f"s3://{BUCKET}/runs/{run}"

    def read(self, run: str, name: str) -> str:
        return self.s3.get_object(Bucket=BUCKET, Key=f"runs/{run}/{name}")["Body"].read().decode()

    def losses(self, run: str) -> dict[int, tuple[float, float]]:
        """Of every step that was logged, the last record's."""
        records = [json.loads(line) for line in self.read(run, "metrics.jsonl").splitlines()]
        return {one["step"]: (one["loss"], one["generative_loss"]) for one in records if one["kind"] == "train"}

    def step(self, run: str) -> int:
        """The last step that a run under way has logged, as its own copy on a node says; 0 before any."""
        last = 0
        for path in self.cluster.scratch.glob(f"genatt-*/{run}/metrics.jsonl"):
            lines = path.read_text().splitlines(keepends=True)
            last = max([last, *(json.loads(line)["step"] for line in lines if line.endswith("\n"))])
        return last

    def job(self, run: str, process: subprocess.Popen[str]) -> str:
        """The id of the run's job, as soon as the cluster has it."""
        deadline = time.monotonic() + JOB_SECONDS
        while True:
            listed = json.loads(self.genatt("jobs", "list", "--json").stdout)
            if found := [one["id"] for one in listed if one["run"] == self.url(run)]:
                return found[0]
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline

    def seconds_a_step(self, run: str) -> float:
        """Of a run that has ended, by its log."""
        records = [json.loads(line) for line in self.read(run, "metrics.jsonl").splitlines()]
        return statistics.median(one["step_seconds"] for one in records if one["kind"] == "train")

    def done(self, run: str) -> int:
        """Steps that a run whose ranks were just killed had done at least: the log of a node tells some of them, the
        heartbeat of a rank that is left tells all, if it gets to it.
        """
        done, deadline = self.step(run), time.monotonic() + _BEAT_SECONDS
        while time.monotonic() < deadline:
            for path in self.cluster.scratch.glob(f"genatt-*/{run}/heartbeat.json"):
                with suppress(OSError, ValueError):  # removed meanwhile
                    done = max(done, json.loads(path.read_text())["step"] - 1)
            time.sleep(0.1)
        return done

    def wait_for_step(self, run: str, step: int, process: subprocess.Popen[str]) -> None:
        deadline = time.monotonic() + JOB_SECONDS
        while self.step(run) < step:
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def _variables(self) -> dict[str, str]:
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "RAY_"))}
        return {**clean, **self.environment, **self.cluster.access, "RAY_API_SERVER_ADDRESS": self.cluster.address}
