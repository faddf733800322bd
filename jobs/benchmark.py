"""Job `benchmark`: `genatt bench NAME` on a node of the cluster; its results go to the run directory.

`python -m jobs.benchmark [job.yaml]`

What it has written so far is in the run at any time, for a node may be lost with hours of rows: below `unfinished/`, in
a directory of this attempt's own, which goes once all of it is in the run. Results of another attempt stay as they are.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any, cast

import ray

from data_pipeline.errors import GenattError
from data_pipeline.filesystems import explaining, filesystem
from data_pipeline.redaction import redact
from data_pipeline.storage import check_access, write_bytes
from genatt_dist import run_storage
from genatt_dist.launch.group import Group
from jobs import driver, options
from jobs.node import on_node
from jobs.options import OUT, BenchmarkJob

_SAID_CHARS = 400
UNFINISHED = "unfinished"


def check(job: BenchmarkJob) -> None:
    """Whether there is such a benchmark with such options. Raises GenattError."""
    from typer.main import get_command

    from genatt_dist.cli import app

    verbs: dict[str, Any] = get_command(app).commands["bench"].commands  # type: ignore[attr-defined]
    if job.name not in verbs:
        raise GenattError(f"config of the benchmark: name={job.name} is unknown: use {', '.join(verbs)}")
    try:
        verbs[job.name].make_context(job.name, ["--out", job.out, *job.arguments()])
    except Exception as error:
        if not hasattr(error, "format_message"):  # of a wrong option alone, in all versions of typer
            raise
        said = " ".join(error.format_message().split()).rstrip(".")
        raise GenattError(f"config of the benchmark: options: {said}: see genatt bench {job.name} --help") from None


def benchmark(job: BenchmarkJob, run: str) -> str:
    """Measure on a node, and return a line that says where the results are."""
    names = on_node(f"bench {job.name}", job, _measure, job, run)
    return f"{redact(run)} has {', '.join(names)}"


def _measure(job: BenchmarkJob, run: str) -> list[str]:
    """In a task: names of the files that were written to the run. A process of its own: a benchmark may run out of
    memory, and pins its threads.
    """
    with tempfile.TemporaryDirectory(prefix="genatt-bench-") as directory:
        words = [word.replace(OUT, directory) for word in ("--out", f"{OUT}/{job.out}", *job.arguments())]
        command = [sys.executable, "-m", "genatt_dist.cli", "bench", job.name, *words]
        environment = {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}  # for ranks on other nodes
        return followed(f"genatt bench {job.name}", command, environment, Path(directory), run)


def followed(
    what: str,
    command: Sequence[str],
    environment: Mapping[str, str],
    directory: Path,
    run: str,
    every: float = run_storage.EVERY_SECONDS,
) -> list[str]:
    """Run a program that writes to `directory`, and return the names of its files, which are in the run then.

    every: seconds between looks at what it has written. Raises GenattError where it fails, or its files cannot be
    written at the end.
    """
    unfinished = f"{run.rstrip('/')}/{UNFINISHED}/{datetime.now(UTC):%Y%m%dT%H%M%S.%fZ}"
    group, said = Group(command, environment, stderr=subprocess.PIPE), "nothing"
    with run_storage.mirrored(unfinished, directory, every):
        try:
            for line in cast(IO[bytes], group.process.stderr):
                text = line.decode(errors="replace")
                sys.stderr.write(text)
                said = text.strip() or said
            code = group.process.wait()
        finally:
            group.kill()
        if code:
            raise GenattError(
                f"{what} ended with exit code {code}: {said[-_SAID_CHARS:]}: what it had written is in "
                f"{redact(unfinished)}"
            )
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    names = [path.relative_to(directory).as_posix() for path in files]
    for name, path in zip(names, files, strict=True):
        write_bytes(f"{run}/{name}", path.read_bytes())
    fs, inner = filesystem(unfinished)
    with suppress(GenattError, FileNotFoundError), explaining(unfinished, "remove"):  # all of it is in the run
        fs.rm(inner, recursive=True)
    return names


def work(config: dict[str, Any], run: str) -> None:
    """The job. It measures every time it is submitted: an old measurement is no result of today."""
    job = options.of_benchmark(config)
    check_access(run)
    driver.stage("benchmark", lambda: None, lambda: benchmark(job, run))


if __name__ == "__main__":
    driver.main(work, __doc__ or "")
