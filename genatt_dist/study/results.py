"""What a study found: `study.json` with every arm and comparison, the report beside it, and a printed table.

Every figure is read from an arm's own files. torch is not imported.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from data_pipeline import format as shards
from data_pipeline.errors import GenattError
from genatt_dist import config as configuration
from genatt_dist import runs
from genatt_dist.config import RunConfig
from genatt_dist.evaluation import compare
from genatt_dist.evaluation.report import write_report
from genatt_dist.evaluation.report_data import metric_order, pretty
from genatt_dist.evaluation.statistics import compare as paired
from genatt_dist.evaluation.statistics import holm
from genatt_dist.study.paths import (
    OTHER_INFERENCE,
    SPLIT,
    STUDY,
    calibration_of,
    finished,
    read_json,
    run_of,
    write_json,
)
from genatt_dist.study.plan import Study

_HARDWARE = ("python", "versions", "device", "cpu_count", "memory_gib")


def write(study: Study, out: Path, failures: Mapping[str, str], command: str) -> dict[str, Any]:
    """Write study.json, report.json and report.html into `out` from the arms that are finished; return study.json.

    failures: arm → one line. command: how the study was started.
    """
    done = [name for name in study.arms if finished(out, name) and name not in failures]
    arms = {name: _arm(study, out, name) for name in done}
    arms |= {name: {"state": "failed", "error": _portable(error, out)} for name, error in failures.items()}
    first = study.config(next(iter(study.arms)))
    manifest = shards.load_manifest(first.data.path)
    report: dict[str, Any] = {
        "command": command,
        "dataset": {
            "name": manifest.name,
            "users": manifest.num_users,
            "items": manifest.num_items,
            "interactions": manifest.num_interactions,
        },
        "protocol": _evaluation(out, done[0])["protocol"] if done else {},
        "cap_seconds": first.training.max_seconds,
        "arms": {name: arms.get(name, {"state": "waiting"}) for name in study.arms},
        "comparisons": comparisons(study, out, done),
        "environment": _environment(out, done),
    }
    write_json(out / STUDY, report)
    shown = {key: report[key] for key in ("dataset", "protocol", "comparisons")} | {"models": _models(report, done)}
    write_report(shown, {name: run_of(out, name) for name in done}, out)
    return report


def print_results(report: dict[str, Any], console: Console) -> None:
    """The arms, then the comparisons of the first metric."""
    metrics = report["comparisons"]["metrics"]
    arms = Table(title=_title(report), title_justify="left", title_style="", box=None, pad_edge=False)
    arms.add_column("arm", no_wrap=True)
    for name in (f"valid\n{pretty(metrics[0])}", *(f"test\n{pretty(metric)}" for metric in metrics), "epochs", "s"):
        arms.add_column(name, justify="right")
    for name, arm in report["arms"].items():
        if arm["state"] != "done":
            arms.add_row(pretty(name), arm["state"])
            continue
        values = [arm["valid"].get(metrics[0]), *(arm["test"].get(metric) for metric in metrics)]
        cells = ["–" if value is None else f"{value:.4f}" for value in values]
        seconds = f"{arm['train']['seconds']:,.0f}{' (cap)' if arm['capped'] else ''}"
        arms.add_row(pretty(name), *cells, str(arm["train"]["epochs"]), seconds)
    console.print(arms)
    for family in report["comparisons"]["families"]:
        rows = [row for row in family["rows"] if row["metric"] == report["comparisons"]["metrics"][0]]
        if not rows:
            continue
        title = f"\n{pretty(rows[0]['metric'])}, {family['question']}"
        if not family["complete"]:
            title += f" (incomplete: {len(rows)} of {family['tests_a_metric']} tests; corrected for all of them)"
        table = Table(title=title, title_justify="left", title_style="", box=None, pad_edge=False)
        table.add_column("arm")
        table.add_column("against")
        share = f"{report['comparisons']['bootstrap']['confidence']:.0%}"
        for name in ("difference", "relative", f"{share} interval", "p (Holm)"):
            table.add_column(name, justify="right", no_wrap=True)
        for row in rows:
            _, difference, relative, interval, _, corrected = compare.cells(row)
            names = (pretty(row["arm"]), pretty(row["against"]))
            table.add_row(*names, difference, relative, interval, corrected)
        console.print(table)


def check_target(target: Path) -> None:
    """Whether `copy` will be able to write there: days of training end with it. Raises GenattError."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=target.parent):
            pass
        if target.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if target.exists() and not os.access(target, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise GenattError(f"cannot write {target}: {error.strerror}; choose another --out-file") from None


def copy(out: Path, target: Path) -> None:
    """study.json as `target`, for instance in benchmarks/results."""
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(out / STUDY, target)


def _arm(study: Study, out: Path, name: str) -> dict[str, Any]:
    run = run_of(out, name)
    config, summary = runs.read_config(run), json.loads((run / runs.SUMMARY).read_text())
    evaluation, train = _evaluation(out, name), summary["train"]
    limit = config.training.max_seconds
    capped = limit is not None and train["seconds"] >= limit and train["epochs"] < config.training.epochs
    arm = {
        "state": "done",
        "attention": config.model.attention.model_dump(mode="json"),
        "config_hash": hashlib.sha256(configuration.dump(config).encode()).hexdigest(),
        "seed": config.training.seed,
        "inference": inference(config),
        "best_step": evaluation["step"],
        "valid": _ordered(summary["valid"]),
        "test": _ordered(evaluation["metrics"]),
        "test_under_other_inference": {
            other: {"attention": found["attention"], "metrics": _ordered(found["metrics"])}
            for other, found in (read_json(run / OTHER_INFERENCE) or {}).items()
            if other in study.arms[name].also_infer  # what was asked for once may be asked for no more
        },
        "map_statistics": {key: value for key, value in evaluation["metrics"].items() if "/" in key},
        "train": train,
        "capped": capped,
        "threads": (read_json(run / "environment.json") or {}).get("threads_per_rank"),
    }
    if study.arms[name].match_noise:
        arm["matched_noise"] = read_json(calibration_of(out, name))
    return arm


def inference(config: RunConfig) -> str:
    """How the model's maps are made when it is evaluated."""
    attention = config.model.attention.model_dump()
    attention = attention.get("generator") or attention  # a hybrid's map is random as its generator is
    if attention["type"] == "diffusion":
        return f"sampled in {attention['sampling_steps']} steps, eta {attention['eta']:g}"
    if attention.get("inference") == "mc":
        return f"mean of {attention['mc_samples']} samples"
    return str(attention.get("inference", "no noise"))


def comparisons(study: Study, out: Path, done: Sequence[str]) -> dict[str, Any]:
    """Every planned test whose two arms are done. No test is in two families."""
    asked = study.comparisons
    families = {
        f"every arm against {pretty(asked.reference)}": [
            (name, asked.reference) for name in study.arms if name != asked.reference
        ],
        f"{' and '.join(map(pretty, asked.claims))} against every control": [
            (claim, control) for claim in asked.claims for control in study.controls
        ],
    }
    evaluated = {name: compare.read(run_of(out, name), SPLIT) for name in done}
    for name in done[1:]:
        compare.check_comparable(evaluated[done[0]], evaluated[name], SPLIT)
    settings = asked.model_dump(include={"resamples", "confidence", "seed"})
    result = []
    for question, planned in families.items():
        pairs = [(a, b) for a, b in planned if a in done and b in done]
        missing = [1.0] * (len(planned) - len(pairs))  # counted as the least certain: no p becomes too small by them
        rows: list[dict[str, Any]] = []
        for metric in asked.metrics:  # each metric is a family of its own; the first is the one that is decided on
            found = [paired(evaluated[a].rank_U, evaluated[b].rank_U, metric, **settings) for a, b in pairs]
            corrected = holm([*(one.p for one in found), *missing])[: len(found)]
            rows += [
                {"arm": a, "against": b, "metric": metric, **asdict(one), "relative": compare.finite(one.relative),
                 "p_holm": p}
                for (a, b), one, p in zip(pairs, found, corrected, strict=True)
            ]  # fmt: skip
        result.append({"question": question, "tests_a_metric": len(planned), "complete": not missing, "rows": rows})
    return {
        "split": SPLIT,
        "metrics": list(asked.metrics),
        "bootstrap": settings | {"unit": "user", "interval": "percentile"},
        "correction": "Holm, over the planned tests of a family on one metric",
        "families": result,
    }


def _models(report: dict[str, Any], done: Sequence[str]) -> list[dict[str, Any]]:
    return [
        {"name": name, **{key: report["arms"][name][key] for key in ("seed", "valid", "test", "train")}}
        for name in done
    ]


def _title(report: dict[str, Any]) -> str:
    dataset = report["dataset"]
    return f"{dataset['name']}: {dataset['users']:,} users, {dataset['items']:,} items"


def _ordered(metrics: Mapping[str, float]) -> dict[str, float]:
    """Ranking metrics alone: the statistics of the maps have a place of their own."""
    return {name: metrics[name] for name in sorted(metrics, key=metric_order) if "/" not in name}


def _evaluation(out: Path, name: str) -> dict[str, Any]:
    evaluation = read_json(run_of(out, name) / f"evaluation-{SPLIT}.json")
    if evaluation is None:
        raise GenattError(f"arm {name} of {out} is not evaluated: start the study again")
    return evaluation


def _environment(out: Path, done: Sequence[str]) -> dict[str, Any]:
    found = read_json(run_of(out, done[0]) / "environment.json") if done else None
    return {key: found[key] for key in _HARDWARE if key in found} if found else {}


def _portable(text: str, out: Path) -> str:
    """Without the place of this study on this machine."""
    return text.replace(str(out.resolve()), "OUT").replace(str(out), "OUT")
