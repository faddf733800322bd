"""Job `pipeline`: prepare → train → evaluate → report, from one YAML (configs/pipeline.yaml).

A stage whose result is there, of the same configuration, is skipped: a pipeline that is submitted again goes on where
it was. `python -m jobs.pipeline [job.yaml]`
"""

from __future__ import annotations

from typing import Any

from jobs import driver, evaluate, options, prepare, report, train


def work(config: dict[str, Any], run: str) -> None:
    """The job."""
    pipeline = options.of_pipeline(config)
    shards, ranking, page = pipeline.prepare, pipeline.evaluate, pipeline.report
    if shards is not None:
        driver.stage("prepare", lambda: prepare.already(shards), lambda: prepare.prepare(shards, run))
    driver.stage("train", lambda: train.already(pipeline.train, run), lambda: train.train(pipeline.train, run))
    if ranking is not None:
        driver.stage("evaluate", lambda: evaluate.already(ranking, run), lambda: evaluate.evaluate(ranking, run))
    if page is not None:
        driver.stage("report", lambda: report.already(page, run), lambda: report.report(page, run))


if __name__ == "__main__":
    driver.main(work, __doc__ or "")
