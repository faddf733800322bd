"""The last stage of a pipeline: one page of the run, drawn from what training and evaluation left."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from data_pipeline.redaction import redact
from data_pipeline.storage import write_bytes
from genatt_dist.training.checkpoint.files import read_if_there
from jobs.evaluate import local
from jobs.options import ReportStage

_FILE, _PAGE = "report.json", "report.html"


def report(stage: ReportStage, run: str) -> str:
    """Draw the page, and return a line that says where it is."""
    from genatt_dist.evaluation.collect import collect
    from genatt_dist.evaluation.report import print_table, write_report

    with local(run) as directory, tempfile.TemporaryDirectory(prefix="genatt-report-") as temporary:
        content, named = collect([directory])
        drawn = Path(temporary)
        write_report(content, named, drawn)
        for name in (_PAGE, _FILE):  # the page first: with the file of its numbers it counts as done
            write_bytes(f"{_out(stage, run)}/{name}", (drawn / name).read_bytes())
    print_table(content)
    return redact(f"{_out(stage, run)}/{_PAGE}")


def already(stage: ReportStage, run: str) -> str | None:
    """Where the page is, if it holds what the run holds now."""
    from genatt_dist.evaluation.collect import collect
    from genatt_dist.evaluation.report_data import without_nan

    found = read_if_there(f"{_out(stage, run)}/{_FILE}")
    if found is None:
        return None
    with local(run) as directory:
        content, _ = collect([directory])
    same = json.loads(found) == json.loads(json.dumps(without_nan(content)))
    return redact(f"{_out(stage, run)}/{_PAGE}") if same else None


def _out(stage: ReportStage, run: str) -> str:
    return (stage.out or f"{run}/report").rstrip("/")
