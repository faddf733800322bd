"""A job's configuration is checked where it is submitted: a mistake is one line that names key, value and mend."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks.scaling import grid as scaling
from data_pipeline.errors import GenattError
from jobs import driver, options, submit
from jobs.packaging import checkout

PIPELINE = checkout() / "configs" / "pipeline.yaml"
RUN = "s3://bucket/runs/a"


def load(*overrides: str, kind: str = "pipeline", path: Path | None = PIPELINE) -> dict[str, Any]:
    return options.load(kind, path, overrides, RUN)


def test_shards_go_beside_the_run_and_training_reads_them() -> None:
    tree = load()
    assert tree["prepare"]["out"] == tree["train"]["data"]["path"] == f"{RUN}-shards"
    assert load("prepare.out=s3://bucket/shards")["train"]["data"]["path"] == "s3://bucket/shards"
    assert load("prepare=null", "train.data.path=s3://b/shards")["train"]["data"]["path"] == "s3://b/shards"


def test_what_the_job_reads_is_what_was_submitted(tmp_path: Path) -> None:
    job = submit.job_of("pipeline", PIPELINE, ["train.training.epochs=3"], RUN)
    (tmp_path / "job.yaml").write_text(job.document)
    config, run = driver.read(tmp_path / "job.yaml")
    assert run == RUN
    pipeline = options.of_pipeline(config)
    assert pipeline.train.training.epochs == 3
    assert pipeline.train.model.attention.type == "diffusion"
    assert pipeline.prepare is not None
    assert pipeline.prepare.model_fields_set == {
        "source",
        "out",
        "num_shards",
    }  # the rest is a parent's, if there is one


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("prepar.source=a", "unknown key prepar: did you mean prepare?"),
        ("prepare.num_shard=2", "unknown key prepare.num_shard: did you mean prepare.num_shards?"),
        ("train.trainin.epochs=2", "section train: unknown key trainin: did you mean training?"),
        ("evaluate.split=[test]", "unknown key evaluate.split: did you mean evaluate.splits?"),
        ("evaluate.splits=[train]", "evaluate.splits.0='train': input should be 'valid' or 'test'"),
        ("evaluate.inference=[fast]", "'fast' is not of the form KEY=VALUE"),
        ("prepare.num_shards=0", "prepare.num_shards=0: input should be greater than or equal to 1"),
        ("train=null", "train is missing"),
        ("train.data.path=/elsewhere", "leave train.data.path out, or drop the section prepare"),
        ("evaluate.splits=[valid]", "report needs an evaluation on test"),
        ("evaluate=null", "report needs an evaluation on test"),
        ("report.out=''", "report.out='': string should have at least 1 character"),
    ],
)
def test_a_mistake_is_told_with_its_mend(override: str, message: str) -> None:
    with pytest.raises(GenattError) as refused:
        load(override)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_local_paths_become_absolute_and_names_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "log.parquet").touch()
    config = tmp_path / "p.yaml"
    config.write_text("source: log.parquet")
    tree = options.load("prepare", config, ["out=shards"], "unused")
    assert (tree["source"], tree["out"]) == (str(tmp_path / "log.parquet"), str(tmp_path / "shards"))
    config.write_text("source: ml-100k")
    tree = options.load("prepare", config, [], str(tmp_path / "there"))
    assert (tree["source"], tree["out"]) == ("ml-100k", str(tmp_path / "there"))
    config.write_text(yaml.safe_dump({"data": {"path": "shards"}}))
    assert options.load("train", config, [], RUN)["data"]["path"] == str(tmp_path / "shards")


def test_options_of_a_benchmark_are_those_of_its_verb() -> None:
    job = options.of_benchmark(
        load("name=steps", "options={quick: true, select: [a=b, c=d]}", kind="benchmark", path=None)
    )
    assert job.arguments() == ["--quick", "--select", "a=b", "--select", "c=d"]
    assert (job.cpus, job.gpus) == (1.0, None)
    ray = options.of_benchmark(load("name=scaling", "options={launcher: ray}", kind="benchmark", path=None))
    assert (ray.cpus, ray.gpus) == (0.0, 0.0)  # its ranks reserve what they need
    configs = checkout() / "configs"
    ready = submit.job_of("benchmark", configs / "benchmark.yaml", [], RUN)
    assert ready.config["cpus"] == 0.0
    assert scaling.read(checkout() / ready.config["options"]["config"], {}).ranks == (1, 2)
    config = configs / "pipeline.yaml"
    with pytest.raises(GenattError, match="is a pipeline's: submit it"):
        submit.job_of("train", config, [], RUN)
    with pytest.raises(GenattError, match=r"unknown key prepare: known: .*name"):
        submit.job_of("benchmark", config, [], RUN)


def test_a_benchmark_that_is_none_is_refused(tmp_path: Path) -> None:
    config = tmp_path / "b.yaml"
    config.write_text("name: step")
    with pytest.raises(GenattError, match="name=step is unknown: use steps"):
        submit.job_of("benchmark", config, [], RUN)
    with pytest.raises(GenattError, match=r"No such option: --quik.*see genatt bench steps --help"):
        submit.job_of("benchmark", config, ["name=steps", "options.quik=true"], RUN)


def test_a_job_without_its_document_is_told_so(tmp_path: Path) -> None:
    with pytest.raises(GenattError, match=r"cannot read job document .*`genatt submit` writes it"):
        driver.read(tmp_path / "job.yaml")
    (tmp_path / "job.yaml").write_text("config: {}")
    with pytest.raises(GenattError, match="'run': `genatt submit` writes it"):
        driver.read(tmp_path / "job.yaml")
