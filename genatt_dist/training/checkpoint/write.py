"""One rank's part of a checkpoint, written without a word to the others, and sealed by rank 0 when all parts are there.

Ranks tell each other by files (`part-00003.json`: names and sums of what that rank wrote), not by collectives, so that
a thread can write while the training step uses the process group. A token, new for each save, tells a part from one
that a killed save left.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass

from torch import Tensor

from data_pipeline.errors import GenattError
from data_pipeline.storage import redact, write_bytes
from genatt_dist.embedding.table import TableShard
from genatt_dist.training.checkpoint import tensors
from genatt_dist.training.checkpoint.files import (
    AMENDED,
    CONFIG,
    DENSE,
    PROGRESS,
    TABLES,
    inside,
    read_if_there,
    remove,
    write,
    write_complete,
)
from genatt_dist.training.checkpoint.progress import Progress
from genatt_dist.training.checkpoint.read import ROWS, STATE, Rectangle

PARTS_SECONDS = 600.0  # rank 0 waits so long for the others' parts, after its own is written
_POLL_SECONDS = (0.01, 1.0)


@dataclass(frozen=True)
class Whole:
    """What rank 0 adds: the dense state by name, the progress and the configuration (YAML)."""

    dense: Mapping[str, Tensor]
    progress: Progress
    config: str


def write_part(path: str, rank: int, token: int, shards: list[TableShard]) -> None:
    """Write what lies on this rank of the sharded tables, and then say so; where it fails, say that."""
    try:
        files, rectangles = {}, []
        for index, shard in enumerate(shards):
            name = f"table-{rank:05d}-{index:02d}.safetensors"
            state = {f"{STATE}{key}": tensors.of(value) for key, value in shard.optimizer.items()}
            files[name] = write(f"{path}/{name}", tensors.serialise({ROWS: tensors.of(shard.rows)} | state))
            rectangles.append(Rectangle(name, shard.name, shard.first_row, shard.first_column, *shard.rows.shape))
    except Exception as error:
        with suppress(Exception):  # what went wrong here is the news
            _say(path, rank, {"token": token, "error": str(error)})
        raise
    _say(path, rank, {"token": token, "files": files, "tables": [asdict(one) for one in rectangles]})


def seal(path: str, token: int, num_parts: int, whole: Whole, seconds: float = PARTS_SECONDS) -> None:
    """Write rank 0's files, wait for `num_parts` parts, and make the checkpoint complete.

    Raises GenattError when a rank failed, or said nothing for so many seconds.
    """
    files = {
        DENSE: write(
            f"{path}/{DENSE}",
            tensors.serialise({name: tensors.of(value) for name, value in whole.dense.items()}),
        ),
        PROGRESS: write(f"{path}/{PROGRESS}", [json.dumps(asdict(whole.progress), indent=2).encode()]),
        CONFIG: write(f"{path}/{CONFIG}", [whole.config.encode()]),
    }
    deadline = time.monotonic() + seconds
    told = [_wait(path, rank, token, deadline, seconds) for rank in range(num_parts)]
    for part in told:
        files |= part["files"]
    remove([_part(path, rank) for rank in range(num_parts)])
    if tables := [one for part in told for one in part["tables"]]:
        files[TABLES] = write(f"{path}/{TABLES}", [json.dumps(tables, indent=1).encode()])
    complete(path, files)


def complete(path: str, files: dict[str, str]) -> None:
    """Write COMPLETE: names and sums of all files, which must be there."""
    write_complete(path, json.dumps({name: files[name] for name in sorted(files)}, indent=2).encode())


def amend(path: str, files: Mapping[str, str], progress: Progress) -> None:
    """Give a complete checkpoint, whose files are these, another progress: at no moment is it incomplete."""
    digest = write(f"{path}/{AMENDED}", [json.dumps(asdict(progress), indent=2).encode()])
    complete(path, {**files, AMENDED: digest})


def _say(path: str, rank: int, content: dict[str, object]) -> None:
    write_bytes(_part(path, rank), json.dumps(content).encode())


def _part(path: str, rank: int) -> str:
    return inside(path, f"part-{rank:05d}.json")


def _wait(path: str, rank: int, token: int, deadline: float, seconds: float) -> dict[str, dict[str, str]]:
    pause = _POLL_SECONDS[0]
    while True:
        part = None
        with suppress(ValueError):  # read while it was being written
            part = json.loads(read_if_there(_part(path, rank)) or "null")
        if part and part["token"] == token:
            if "error" in part:
                raise GenattError(f"checkpoint {redact(path)}: rank {rank} could not write its part: {part['error']}")
            return dict(part)
        if time.monotonic() > deadline:
            raise GenattError(
                f"checkpoint {redact(path)}: rank {rank} has not written its part {seconds:.0f} s after rank 0; "
                "look into that rank's messages, and let training.checkpoint.path be where all machines write, then go "
                "on by --resume"
            )
        time.sleep(pause)
        pause = min(2 * pause, _POLL_SECONDS[1])
