"""`prepare` in a process of its own, timed; Ray's start apart, which is over before the clock starts.

    python -m benchmarks.ingest.pipeline --source s3://bucket/log/interactions*.parquet --out DIR --num-shards 16

Prints one JSON line: seconds of the imports, of Ray's start, of `prepare`, of its stages; CPU seconds by role of the
process meanwhile; bytes spilled.
"""

from __future__ import annotations

import time

_BEGAN = time.perf_counter()

import argparse  # noqa: E402
import json  # noqa: E402

import psutil  # noqa: E402

from data_pipeline.config import PrepareConfig  # noqa: E402
from data_pipeline.local_ray import local_ray  # noqa: E402
from data_pipeline.memory import ROLES, SpillCounter  # noqa: E402
from data_pipeline.prepare import prepare  # noqa: E402
from data_pipeline.progress import Stages  # noqa: E402

IMPORT_SECONDS = time.perf_counter() - _BEGAN


def cpu_seconds() -> dict[str, float]:
    """CPU seconds up to now of this process and its descendants that still run, and the dead ones they waited for."""
    seconds: dict[str, float] = {}
    this = psutil.Process()
    for process in [this, *this.children(recursive=True)]:
        try:
            line, times = " ".join([*process.cmdline(), ""]), process.cpu_times()
        except psutil.Error:  # ended meanwhile
            continue
        role = "driver" if process == this else next((role for mark, role in ROLES if mark in line), "other")
        own = times.user + times.system
        dead = times.children_user + times.children_system
        seconds[role] = seconds.get(role, 0.0) + own
        seconds["ended"] = seconds.get("ended", 0.0) + dead
    return seconds


def main() -> None:
    """Prepare, and print what it took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--num-shards", type=int, required=True)
    parser.add_argument("--num-cpus", type=int)
    parser.add_argument("--object-store-bytes", type=int)
    arguments = parser.parse_args()
    config = PrepareConfig(**vars(arguments))

    stages = Stages(enabled=False)
    with local_ray(config.num_cpus, config.object_store_bytes, (config.source,)) as ray_seconds:
        spilled, before, began = SpillCounter(), cpu_seconds(), time.perf_counter()
        manifest = prepare(config, stages=stages)
        seconds = time.perf_counter() - began
        after, spilled_bytes = cpu_seconds(), spilled.bytes()
    used = {role: round(after[role] - before.get(role, 0.0), 2) for role in after}
    print(
        json.dumps(
            {
                "import_seconds": round(IMPORT_SECONDS, 3),
                "ray_start_seconds": round(ray_seconds, 3),
                "seconds": round(seconds, 3),
                "steps": {stage.name: round(stage.seconds, 3) for stage in stages.done},
                "rows_in": manifest.ledger[0].rows_in,
                "rows_out": manifest.ledger[-1].rows_out,
                "cpu_seconds": {role: value for role, value in used.items() if value >= 0},
                "spilled_bytes": spilled_bytes,
            }
        )
    )


if __name__ == "__main__":
    main()
