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
from dataclasses import asdict

import torch
from torch import Tensor

from data_pipeline.storage import check_access, check_free
from genatt_dist.embedding.table import TableShard
from genatt_dist.training.checkpoint import tensors
from genatt_dist.training.checkpoint.files import BUNDLE, CONFIG, DENSE, PROGRESS, write
from genatt_dist.training.checkpoint.read import Checkpoint
from genatt_dist.training.checkpoint.tables import dense_name
from genatt_dist.training.checkpoint.write import complete

_WEIGHTS = ("parameter.", "buffer.")


def export(source: Checkpoint, out: str) -> None:
    """Write the bundle of a checkpoint, whose files are checked first, to a directory that is not there yet.

    A table goes through memory in blocks. Raises GenattError: damage, an `out` that is there or cannot be written.
    """
    out = out.rstrip("/")
    check_access(out)
    check_free(out)
    source.verify()
    weights = {
        name: tensors.stored(source.file(DENSE), entry)
        for name, entry in source.dense_entries.items()
        if name.startswith(_WEIGHTS)
    }
    for table in sorted({one.table for one in source.rectangles}):
        weights[f"parameter.{dense_name(table)}"] = _rows(source, table)
    config, progress = source.config, source.progress
    facts = {
        "model": config.model.attention.type,
        "step": progress.step,
        "manifest_hash": progress.manifest_hash,
        "vocabulary_hash": progress.vocabulary_hash,
        "num_items": weights["parameter.items.weight"].shape[0] - 1,
        "valid": progress.best_metrics if progress.best_step == progress.step else {},
    }
    files = {
        DENSE: write(f"{out}/{DENSE}", tensors.serialise(weights)),
        CONFIG: write(f"{out}/{CONFIG}", [source.config_text.encode()]),
        PROGRESS: write(f"{out}/{PROGRESS}", [json.dumps(asdict(progress), indent=2).encode()]),
        BUNDLE: write(f"{out}/{BUNDLE}", [json.dumps(facts, indent=2).encode()]),
    }
    complete(out, files)


def _rows(source: Checkpoint, table: str) -> tensors.Source:
    """All rows of a table in float32, from the files of whichever ranks have them."""
    rows, columns = source.table_shape(table)

    def blocks() -> Iterator[Tensor]:
        for first, count in tensors.spans(rows, 4 * columns):
            block = torch.empty(count, columns)
            source.read_shard(TableShard(table, first, 0, block, {}), with_optimizer=False)
            yield block

    return tensors.Source(torch.float32, (rows, columns), blocks)
