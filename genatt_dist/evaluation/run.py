"""Evaluate a finished run on a split, and keep what it gave beside it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow.compute as pc

from genatt_dist.config import RunConfig
from genatt_dist.data.sequences import Sequences
from genatt_dist.evaluation.evaluate import Result, evaluate


def evaluate_run(run: Path, split: str, progress: Callable[[int], None] = lambda users: None) -> dict[str, Any]:
    """Rank the targets of `split` with the run's best checkpoint.

    Writes `evaluation-SPLIT.json` and each user's rank to `ranks-SPLIT.parquet` (what a paired comparison needs) into
    the run.
    """
    from genatt_dist.serving.trained import load

    trained = load(run)
    result = evaluate(
        trained.backbone,
        trained.table,
        trained.sequences,
        split,
        trained.config,
        trained.device,
        progress=progress,
        diagnose=True,
    )
    report = {
        "model": trained.config.model.attention.type,
        "split": split,
        "step": trained.step,
        "users": len(result.rank_U),
        "protocol": protocol(trained.config, trained.sequences),
        "metrics": result.metrics,
    }
    write_ranks(run / f"ranks-{split}.parquet", trained.sequences, result)
    (run / f"evaluation-{split}.json").write_text(json.dumps(report, indent=2))
    return report


def protocol(config: RunConfig, sequences: Sequences) -> dict[str, Any]:
    """How the numbers were made, in words a report prints."""
    names = sequences.manifest.config
    return {
        "split": "leave-one-out: last = test, second last = valid",
        "ranking": "full catalogue",
        "exclude_seen": config.evaluation.exclude_seen,
        "max_len": config.data.max_len,
        "k_core": f"users >= {names['min_user_interactions']}, items >= {names['min_item_interactions']}",
        "order": "user, time, original row (stable)",
        "selection": "best valid ndcg@10; test once",
        "loss": config.loss.kind
        if config.loss.kind != "sampled"
        else f"sampled ({config.loss.num_negatives} {config.loss.proposal})",
    }


def write_ranks(path: Path, sequences: Sequences, result: Result) -> None:
    """One row a user with a target: user_id, rank of its target from 1."""
    users = pc.filter(sequences.user_ids, sequences.has_targets)
    pl.DataFrame({"user_id": pl.from_arrow(users), "rank": result.rank_U}).write_parquet(path)
