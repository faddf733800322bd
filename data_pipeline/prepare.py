"""From a raw log to a published directory of sequences: the stages, in order."""

import hashlib
import tempfile
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import ray
import ray.data

from data_pipeline import tasks, vocabulary
from data_pipeline.config import PrepareConfig
from data_pipeline.errors import GenattError
from data_pipeline.format import (
    MANIFEST,
    VOCABULARY,
    LedgerEntry,
    Manifest,
    RawFile,
    ShardFile,
    WrittenFile,
    parquet_bytes,
)
from data_pipeline.interactions import k_core
from data_pipeline.local_ray import local_ray, numbered, outputs
from data_pipeline.progress import Stage, Stages
from data_pipeline.readers import Plan, plan, read_table
from data_pipeline.sources import Source, resolve
from data_pipeline.splits import LeaveOneOut
from data_pipeline.storage import publishing, write_bytes

BLOCKS: dict[str, Any] = {"batch_format": "pyarrow", "batch_size": None}  # a task sees a block as it is
VOCABULARY_ROW_GROUP = 1 << 16


def prepare(config: PrepareConfig, progress: bool = True) -> Manifest:
    """Prepares `config.source` into the new directory `config.out`; the same input and options give the same bytes.

    Nothing is at `config.out` before all of it is: not after an error, and not after Ctrl-C.

    Parameters
    ----------
    progress
        Show one line a stage, and a table at the end, on stderr.

    Raises
    ------
    GenattError
        Anything the user can mend; see `sources`, `readers`, `storage` and `local_ray`.
    """
    with (
        publishing(config.out) as directory,
        tempfile.TemporaryDirectory(prefix="genatt-") as workdir,
        Stages(progress) as stages,
    ):
        source = resolve(config, Path(workdir))
        planned = plan(source, config)  # before Ray starts: most errors are known by now
        with local_ray(config.num_cpus):
            manifest = _run(source, planned, config, directory, stages)
        write_bytes(f"{directory}/{MANIFEST}", manifest.to_json())
    stages.summary(f"{manifest.name}: {manifest.num_users:,} users, {manifest.num_items:,} items")
    return manifest


def _run(source: Source, planned: Plan, config: PrepareConfig, directory: str, stages: Stages) -> Manifest:
    """All stages; writes everything but the manifest, which it returns."""
    split = LeaveOneOut()

    chunks = numbered("chunk", len(planned.chunks))
    chunks = chunks.map_batches(tasks.read_block, fn_kwargs={"plan": planned, "config": config}, **BLOCKS)
    with stages.stage("read", steps=len(planned.chunks)) as read:
        blocks = _collect(chunks, read)

    numbers = numbered("shard", config.num_shards)
    numbers = numbers.map_batches(tasks.order_shard, fn_kwargs={"blocks": blocks, "config": config}, **BLOCKS)
    with stages.stage("order", rows_in=read.rows_out, steps=config.num_shards) as order:
        shards = _collect(numbers, order)
    duplicates = {} if config.duplicates == "none" else {config.duplicates: read.rows_out - order.rows_out}
    del blocks, numbers  # the object store may drop them now

    with stages.stage("k-core", rows_in=order.rows_out) as core:
        # Here, not in tasks: rounds are many and short, and two columns are little; they are read in place.
        pairs = pl.concat([pl.DataFrame(shard.select(["user_id", "item_id"])) for shard in ray.get(shards)])
        pairs, outside = k_core(pairs, config.min_user_interactions, config.min_item_interactions)
        core.advance(pairs.height)
    if pairs.height == 0:
        raise GenattError(
            f"no rows left of {order.rows_out}: no users with {config.min_user_interactions} rows on items with "
            f"{config.min_item_interactions}: lower min_user_interactions or min_item_interactions"
        )

    items = vocabulary.build(pairs["item_id"])
    arguments = {"shards": shards, "vocabulary": ray.put(items.to_arrow()), "directory": directory}
    files = numbered("block", len(shards))
    files = files.map_batches(tasks.write_shard, fn_kwargs=arguments | {"config": config, "split": split}, **BLOCKS)
    described = []
    with stages.stage("write", rows_in=core.rows_out, steps=len(shards)) as write:
        for ref, _ in outputs(files, write.name):
            described.append(pl.DataFrame(ray.get(ref)))
            write.advance(int(described[-1]["interactions"].sum()))

    written = pl.concat(described).filter(pl.col("users") > 0).sort("path")
    train_counts = written.select("dense_id", "train_count").explode("dense_id", "train_count").drop_nulls()
    return Manifest(
        name=source.name,
        num_users=written["users"].sum(),
        num_items=items.height,
        num_interactions=core.rows_out,
        split=split,
        files=tuple(ShardFile(**row) for row in written.drop("dense_id", "train_count").to_dicts()),
        vocabulary=_write_vocabulary(vocabulary.finish(items, train_counts), source, config, directory),
        source=tuple(RawFile(path=file.label, bytes=file.bytes) for file in source.files),
        config=config.recorded(),
        config_hash=config.hash(),
        ledger=(
            LedgerEntry(stage="read", rows_in=read.rows_out, rows_out=read.rows_out),
            LedgerEntry(stage="order", rows_in=read.rows_out, rows_out=order.rows_out, dropped=duplicates),
            LedgerEntry(stage="k-core", rows_in=order.rows_out, rows_out=core.rows_out, dropped=outside),
            LedgerEntry(stage="write", rows_in=core.rows_out, rows_out=write.rows_out),
        ),
    )


def _collect(dataset: ray.data.Dataset, stage: Stage) -> list[ray.ObjectRef]:
    """Runs `dataset` and keeps references to its blocks that have rows."""
    refs = []
    for ref, rows in outputs(dataset, stage.name):
        stage.advance(rows)
        if rows:
            refs.append(ref)
    return refs


def _write_vocabulary(table: pa.Table, source: Source, config: PrepareConfig, directory: str) -> WrittenFile:
    if source.items is not None:
        attributes = read_table(source.items, text=config.item_column)
        table = vocabulary.join_attributes(table, attributes, config.item_column, source.items.label)
    content = parquet_bytes(table, row_group_size=VOCABULARY_ROW_GROUP)
    write_bytes(f"{directory}/{VOCABULARY}", content)
    return WrittenFile(path=VOCABULARY, bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
