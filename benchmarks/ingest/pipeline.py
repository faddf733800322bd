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
from data_pipeline.memory import SpillCounter, role_of  # noqa: E402
from data_pipeline.prepare import prepare  # noqa: E402
from data_pipeline.progress import Stages  # noqa: E402

IMPORT_SECONDS = time.perf_counter() - _BEGAN


def cpu_times() -> dict[psutil.Process, tuple[str, float, float]]:
    """This process and its descendants: role, CPU seconds up to now, and those of the dead each of them waited for."""
    times: dict[psutil.Process, tuple[str, float, float]] = {}
    this = psutil.Process()
    for process in [this, *this.children(recursive=True)]:
        try:
            line, taken = " ".join([*process.cmdline(), ""]), process.cpu_times()
        except psutil.Error:  # ended meanwhile
            continue
        role = "driver" if process == this else role_of(line)
        times[process] = role, taken.user + taken.system, taken.children_user + taken.children_system
    return times


def used_between(
    before: dict[psutil.Process, tuple[str, float, float]], after: dict[psutil.Process, tuple[str, float, float]]
) -> dict[str, float]:
    """CPU seconds by role, of two `cpu_times`; an idle worker that Ray ended meanwhile counts under "ended"."""
    used: dict[str, float] = {}
    for process, (role, own, dead) in after.items():
        _, own_before, dead_before = before.get(process, (role, 0.0, 0.0))
        used[role] = used.get(role, 0.0) + own - own_before
        used["ended"] = used.get("ended", 0.0) + dead - dead_before
    return {role: round(seconds, 2) for role, seconds in used.items()}


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
        spilled, before, began = SpillCounter(), cpu_times(), time.perf_counter()
        manifest = prepare(config, stages=stages)
        seconds = time.perf_counter() - began
        after, spilled_bytes = cpu_times(), spilled.bytes()
    print(
        json.dumps(
            {
                "import_seconds": round(IMPORT_SECONDS, 3),
                "ray_start_seconds": round(ray_seconds, 3),
                "seconds": round(seconds, 3),
                "steps": {stage.name: round(stage.seconds, 3) for stage in stages.done},
                "rows_in": manifest.ledger[0].rows_in,
                "rows_out": manifest.ledger[-1].rows_out,
                "cpu_seconds": used_between(before, after),
                "spilled_bytes": spilled_bytes,
            }
        )
    )


if __name__ == "__main__":
    main()
