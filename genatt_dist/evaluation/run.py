"""Evaluate a finished run on a split, and keep what it gave beside it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import torch

from data_pipeline.splits import RandomUsers, SplitRule, TimePoint
from genatt_dist.config import RunConfig
from genatt_dist.data.sequences import Sequences
from genatt_dist.evaluation.categories import categories_of
from genatt_dist.evaluation.diagnose import diagnose
from genatt_dist.evaluation.evaluate import Result, evaluate
from genatt_dist.evaluation.maps import write_maps
from genatt_dist.evaluation.report_data import without_nan


def evaluate_run(
    run: Path,
    split: str,
    progress: Callable[[int], None] = lambda users: None,
    inference: Sequence[str] = (),
    only: Sequence[str] = (),
) -> dict[str, Any]:
    """Rank the targets of `split` with the run's best checkpoint.

    Writes into the run: `evaluation-SPLIT.json`, each user's rank to `ranks-SPLIT.parquet` (what a paired comparison
    needs), and the attention maps of a few users to `maps-SPLIT.json`.
    inference: choices other than the run's, as `sampling_steps=10`; files are then named `SPLIT,sampling_steps=10`.
    only: categories, see `evaluate`; files are then named `SPLIT,category=NAME`.
    """
    from genatt_dist.serving.trained import load

    trained = load(run, inference)
    chosen = [f"category={category}" for category in sorted(set(only))]
    name = re.sub(r"[^\w.,=-]", "_", ",".join((split, *sorted(inference), *chosen)))
    of = (trained.backbone, trained.table, trained.sequences, split, trained.config, trained.device)
    result = evaluate(*of, progress=progress, only=only)
    diagnosis = diagnose(*of)
    report = {
        "model": trained.config.model.attention.type,
        "split": split,
        "step": trained.step,
        "inference": list(inference),
        "users": len(result.rank_U),
        "dataset": dataset(trained.sequences),
        "protocol": protocol(trained.config, trained.sequences) | ({"only": ", ".join(chosen)} if only else {}),
        "metrics": result.metrics | diagnosis.values,
        "vectors": diagnosis.vectors,
        "notes": _notes(result),
    }
    write_maps(run / f"maps-{name}.json", trained, split)
    write_ranks(run / f"ranks-{name}.parquet", trained.sequences, result)
    (run / f"evaluation-{name}.json").write_text(json.dumps(without_nan(report), indent=2))
    return report


def dataset(sequences: Sequences) -> dict[str, Any]:
    """Which data the numbers are of; the hash of its manifest tells two preparations apart."""
    manifest = sequences.manifest
    return {
        "name": manifest.name,
        "users": manifest.num_users,
        "items": manifest.num_items,
        "interactions": manifest.num_interactions,
        "manifest_hash": sequences.manifest_hash,
    }


def protocol(config: RunConfig, sequences: Sequences) -> dict[str, Any]:
    """How the numbers were made, in words a report prints."""
    names = sequences.manifest.config
    categories = categories_of(sequences, config.evaluation.category_column, torch.device("cpu"))
    return {
        "split": _split(sequences.manifest.split),
        "ranking": "full catalogue",
        "categories": f"{len(categories.names)} of {categories.column}" if categories else "none",
        "exclude_seen": config.evaluation.exclude_seen,
        "max_len": config.data.max_len,
        "k_core": f"users >= {names['min_user_interactions']}, items >= {names['min_item_interactions']}",
        "order": "user, time, original row (stable)",
        "selection": "best valid ndcg@10; test once",
        "loss": config.loss.kind
        if config.loss.kind != "sampled"
        else f"sampled ({config.loss.num_negatives} {config.loss.proposal})",
    }


def _split(rule: SplitRule) -> str:
    if isinstance(rule, TimePoint):
        return f"time: first from {rule.valid_from} on = valid, first from {rule.test_from} on = test"
    if isinstance(rule, RandomUsers):
        return f"users: last of {rule.valid_share:.0%} = valid, of {rule.test_share:.0%} = test; the others train"
    return "leave-one-out: last = test, second last = valid"


def _notes(result: Result) -> list[str]:
    if any(name.startswith("cc@") for name in result.metrics):
        return []
    return [
        "no CC, F and ILD: the vocabulary has no attribute column that is plainly categories "
        "(evaluation.category_column in the run's config.yaml names one)"
    ]


def write_ranks(path: Path, sequences: Sequences, result: Result) -> None:
    """One row a ranked user: user_id, rank of its target from 1."""
    users = sequences.user_ids.take(pa.array(result.user_U))
    pl.DataFrame({"user_id": pl.from_arrow(users), "rank": result.rank_U}).write_parquet(path)
