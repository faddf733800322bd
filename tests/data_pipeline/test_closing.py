"""Numbers that contradict each other fail a preparation; a split that leaves a part empty is told of."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from in_process import prepare, without_ray

from data_pipeline import prepare as prepare_module
from data_pipeline import tasks, vocabulary
from data_pipeline.config import PrepareConfig
from data_pipeline.errors import GenattError
from data_pipeline.progress import Stages

Options = Callable[..., PrepareConfig]
Log = Callable[..., str]


@pytest.fixture
def rows(log: Log) -> str:
    return log(user_id=[1, 1, 1, 2, 2, 2], item_id=[5, 6, 7, 5, 6, 5], timestamp=[1, 2, 3, 4, 5, 6])


def refused(config: PrepareConfig) -> str:
    with pytest.raises(GenattError, match="nothing is published; this is a defect") as caught:
        prepare(config)
    assert not Path(config.out).exists()
    return str(caught.value)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda one: {"trained": one.trained + 1}, "items train on 2 rows, by the index there are 3"),
        (lambda one: {"train": one.train._replace(counts=one.train.counts * 2)}, "items train on 4 rows, by the index"),
    ],
)
def test_train_counts_that_are_not_the_indices(
    rows: str, options: Options, monkeypatch: pytest.MonkeyPatch, wrong: Callable[..., dict[str, Any]], said: str
) -> None:
    write = tasks.write

    def bad(*arguments: Any) -> tasks.Written:
        written = write(*arguments)
        return dataclasses.replace(written, **wrong(written))

    monkeypatch.setattr(tasks, "write", bad)
    assert refused(options(rows, num_shards=1)).startswith(f"the ledger does not add up: {said}")


def test_counts_that_are_not_the_rows(rows: str, options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    build = vocabulary.build

    def bad(*arguments: Any) -> vocabulary.Vocabulary:
        words = build(*arguments)
        return dataclasses.replace(words, table=words.table.with_columns(pl.col("count") + 1))

    monkeypatch.setattr(vocabulary, "build", bad)
    assert refused(options(rows)).startswith("the ledger does not add up: items are counted on 9 rows, there are 6")


def test_buckets_that_are_not_the_counts(rows: str, options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    build = vocabulary.build

    def bad(*arguments: Any) -> vocabulary.Vocabulary:
        words = build(*arguments)
        assert words.buckets is not None
        return dataclasses.replace(words, buckets=words.buckets.with_columns(pl.col("count") * 2))

    monkeypatch.setattr(vocabulary, "build", bad)
    message = refused(options(rows, hash_buckets=1))
    assert message.startswith("the ledger does not add up: items of bucket 1 are counted on 12 rows, there are 6")


def test_new_rows_counted_twice(rows: str, options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(options(rows, out=tmp_path / "v1", duplicates="exact"))
    monkeypatch.setattr(vocabulary.Vocabulary, "without", lambda words, *_: words)
    message = refused(PrepareConfig(source=rows, out=str(tmp_path / "v2"), append_to=str(tmp_path / "v1")))
    assert message.startswith("the ledger does not add up: items are counted on 12 rows, there are 6")


def notes(config: PrepareConfig, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """What is printed about the split, after the table."""
    with without_ray():
        prepare_module.prepare(config, stages=Stages(enabled=True))
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("split ")]


def test_a_split_that_leaves_a_part_empty(
    rows: str, options: Options, log: Log, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def told(split: str, source: str = rows) -> list[str]:
        name = f"out{np.random.default_rng().integers(1 << 62)}"
        return notes(options(source, out=tmp_path / name, split=split), capsys)

    inside = "a target follows another interaction of its user: choose times inside those of the log"
    assert told("leave_one_out") == []
    assert told("time:2,3") == []
    assert told("time:8,9") == [
        f"split time:8,9: no user has a valid or test target: what is before the first time trains, {inside}"
    ]
    assert told("time:3,9") == [
        f"split time:3,9: no user has a test target: what is before the first time trains, {inside}"
    ]
    assert [line.partition(": what")[0] for line in told("time:0,1")] == [
        "split time:0,1: nothing trains",
        "split time:0,1: no user has a valid or test target",
    ]
    assert told("users:0.001,0.001") == [
        "split users:0.001,0.001: no user has a valid or test target: few users, or users with one interaction, for "
        "these shares: choose others"
    ]
    short = log("short.parquet", user_id=[1, 1, 2], item_id=[5, 6, 5], timestamp=[1, 2, 3])
    assert told("leave_one_out", short) == [
        "split leave_one_out: no user has a valid or test target: no user has 3 interactions on items with ids: "
        "choose another split"
    ]


def test_of_copied_shards_targets_are_not_known(
    rows: str, options: Options, log: Log, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A version that leaves its parent's only shard as it is says nothing of it."""
    prepare(options(rows, out=tmp_path / "v1", num_shards=1, min_user_interactions=2, split="time:8,9"))
    few = log("few.parquet", user_id=[9], item_id=[5], timestamp=[9])
    made = PrepareConfig(source=few, out=str(tmp_path / "v2"), append_to=str(tmp_path / "v1"))
    assert notes(made, capsys) == []
