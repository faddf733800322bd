"""A checkpoint for one process that serves: all weights in one file, no optimizer state, and what data they belong to.

    dense.safetensors   parameters and buffers, with all rows of all tables, whatever ranks held them
    config.yaml         the run's configuration
    progress.json       step, epoch and validation metrics of the checkpoint
    bundle.json         hashes of manifest and vocabulary, sizes
    COMPLETE            sha256 of every other file

It reads like the checkpoint of a run on one rank (`genatt recommend BUNDLE`), and needs the data set of its
configuration beside it: that has the original ids.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict

import torch
from torch import Tensor

from data_pipeline.errors import GenattError
from data_pipeline.filesystems import filesystem
from data_pipeline.storage import check_access, check_free, redact
from genatt_dist.embedding.table import MAP_TABLE, SEEN_TABLE, TableShard
from genatt_dist.training.checkpoint import tensors
from genatt_dist.training.checkpoint.files import BUNDLE, CONFIG, DENSE, PROGRESS, write
from genatt_dist.training.checkpoint.read import Checkpoint
from genatt_dist.training.checkpoint.tables import MAP_BUFFER, dense_name
from genatt_dist.training.checkpoint.write import complete

_WEIGHTS = ("parameter.", "buffer.")


def export(source: Checkpoint, out: str) -> None:
    """Write the bundle of a checkpoint, whose files are checked first, to a directory that is not there yet.

    A table goes through memory in blocks; of an export that failed nothing is left. Raises GenattError: damage, an
    `out` that is there or cannot be written.
    """
    out = out.rstrip("/")
    check_access(out)
    check_free(out, "--export")
    source.verify()
    try:
        _write(source, out)
    except BaseException as error:
        fs, inner = filesystem(out)
        with suppress(Exception):  # what failed is the news
            fs.rm(inner, recursive=True)
        if isinstance(error, OSError):
            raise GenattError(
                f"cannot write {redact(out)}: {error.strerror or error}; choose another --export"
            ) from None
        raise


def _write(source: Checkpoint, out: str) -> None:
    weights = {
        name: tensors.stored(source.file(DENSE), entry)
        for name, entry in source.dense_entries.items()
        if name.startswith(_WEIGHTS)
    }
    tables = {one.table for one in source.rectangles}
    for table in sorted(tables - {MAP_TABLE, SEEN_TABLE}):
        weights[f"parameter.{dense_name(table)}"] = _rows(source, table, torch.float32)
    if MAP_TABLE in tables:
        weights[MAP_BUFFER] = _rows(source, MAP_TABLE, torch.int64)
    config, progress = source.config, source.progress
    facts = {
        "model": config.model.attention.type,
        "step": progress.step,
        "manifest_hash": progress.manifest_hash,
        "vocabulary_hash": progress.vocabulary_hash,
        "num_items": (source.table_shape(SEEN_TABLE)[0] or weights["parameter.items.weight"].shape[0]) - 1,
        "valid": progress.best_metrics if progress.best_step == progress.step else {},
    }
    files = {
        DENSE: write(f"{out}/{DENSE}", tensors.serialise(weights)),
        CONFIG: write(f"{out}/{CONFIG}", [source.config_text.encode()]),
        PROGRESS: write(f"{out}/{PROGRESS}", [json.dumps(asdict(progress), indent=2).encode()]),
        BUNDLE: write(f"{out}/{BUNDLE}", [json.dumps(facts, indent=2).encode()]),
    }
    complete(out, files)


def _rows(source: Checkpoint, table: str, dtype: torch.dtype) -> tensors.Source:
    """All rows of a table, from the files of whichever ranks have them."""
    rows, columns = source.table_shape(table)

    def blocks() -> Iterator[Tensor]:
        for first, count in tensors.spans(rows, dtype.itemsize * columns):
            block = torch.empty(count, columns, dtype=dtype)
            source.read_shard(TableShard(table, first, 0, block, {}), with_optimizer=False)
            yield block

    return tensors.Source(dtype, (rows, columns), blocks)
