"""The whole way on a small real data set: fetch, prepare, train three attention types, evaluate, report (`genatt
quickstart`).
"""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from data_pipeline.config import PrepareConfig
from data_pipeline.errors import GenattError
from data_pipeline.format import MANIFEST
from data_pipeline.prepare import prepare
from genatt_dist import config as configuration
from genatt_dist import runs

ATTENTIONS = ("dot_product", "variational", "diffusion")
_CONFIG = Path(__file__).parents[1] / "configs" / "quickstart.yaml"
_MADE_HERE = {"shards", *ATTENTIONS, "report.html", "report.json"}


def quickstart(source: str, out: Path, launcher: str, overrides: list[str], console: Console) -> dict[str, Any]:
    """Run it into `out` and return the report that `report.json` holds. An earlier quickstart in `out` is replaced."""
    _check_replaceable(out)
    config = configuration.load(_CONFIG, [*overrides, f"data.path={out / 'shards'}"])
    runs.check_launcher(launcher, config.world_size)
    started = time.perf_counter()
    console.rule("1/3 prepare")
    _prepare(source, out)
    summaries = {}
    for number, attention in enumerate(ATTENTIONS, 1):
        console.rule(
            f"2/3 train {attention} ({number} of {len(ATTENTIONS)}): {launcher} launcher, {config.world_size} ranks"
        )
        chosen = configuration.load(
            _CONFIG, [*overrides, f"data.path={out / 'shards'}", f"model.attention.type={attention}"]
        )
        summaries[attention] = runs.train(chosen, out / attention, launcher)
    console.rule("3/3 evaluate on the test split")
    report = _evaluate(config, out, summaries) | {
        "seconds": round(time.perf_counter() - started),
        "environment": json.loads((out / ATTENTIONS[0] / "environment.json").read_text()),
    }
    from genatt_dist.evaluation.report import print_table, write_report

    write_report(report, {attention: out / attention for attention in ATTENTIONS}, out)
    print_table(report)
    console.print(f"{report['seconds']} s in all. Report: {out / 'report.html'}", highlight=False)
    return report


def _check_replaceable(out: Path) -> None:
    """`out` will be deleted, so all that is in it must be an earlier quickstart's."""
    if not out.exists():
        return
    names = {path.name for path in out.iterdir()} if out.is_dir() else {out.name}
    if names - _MADE_HERE or (names and not (out / "shards" / MANIFEST).exists()):
        raise GenattError(f"{out} exists and no quickstart made all of it: choose another --out")


def _prepare(source: str, out: Path) -> None:
    """Fresh shards in `out`. What an earlier quickstart left there goes only when they are complete."""
    whole = out.resolve()
    staging = whole.with_name(f".{whole.name}.new")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        prepare(PrepareConfig(source=source, out=str(staging), num_shards=2))
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        staging.rename(out / "shards")
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def _evaluate(config: configuration.RunConfig, out: Path, summaries: dict[str, dict[str, Any]]) -> dict[str, Any]:
    from genatt_dist.data.sequences import Sequences
    from genatt_dist.evaluation.collect import ranking_only
    from genatt_dist.evaluation.popularity import evaluate_popularity
    from genatt_dist.evaluation.run import evaluate_run, protocol

    sequences = Sequences.read(config.data.path)
    manifest = sequences.manifest
    splits = {split: evaluate_popularity(sequences, split, config).metrics for split in ("valid", "test")}
    models: list[dict[str, Any]] = [{"name": "popularity", "seed": None, **splits, "train": None}]
    for attention, summary in summaries.items():
        test = evaluate_run(out / attention, "test")["metrics"]
        models.append(
            {
                "name": attention,
                "seed": config.training.seed,
                "valid": ranking_only(summary["valid"]),
                "test": ranking_only(test),
                "train": summary["train"],
            }
        )
    return {
        "dataset": {
            "name": manifest.name,
            "users": manifest.num_users,
            "items": manifest.num_items,
            "interactions": manifest.num_interactions,
        },
        "protocol": protocol(config, sequences),
        "models": models,
    }
