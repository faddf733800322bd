"""What `genatt prepare --dry-run` tells: exact where footers tell it, named estimates elsewhere; it does nothing."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import fsspec
import polars as pl
import pytest
import ray
from in_process import prepare
from rich.console import Console
from tiny_data import histories, write_prepared

from data_pipeline import dry_run as planning
from data_pipeline.config import PrepareConfig
from data_pipeline.dry_run import Column, DryRun, Rows, dry_run
from data_pipeline.errors import GenattError

Options = Callable[..., PrepareConfig]
START = 1_600_000_000


@pytest.fixture(autouse=True)
def only_looking(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def start(**_: object) -> None:
        raise AssertionError("Ray was started")

    monkeypatch.setattr(ray, "init", start)


@pytest.fixture
def frame() -> pl.DataFrame:
    rows = pl.int_range(5000, eager=True)
    kinds = ["view", "cart"] * 2500
    return pl.DataFrame({"user_id": rows % 300, "item_id": rows % 77, "timestamp": START + 100 * rows, "kind": kinds})


def looked(config: PrepareConfig) -> DryRun:
    """The dry run; it leaves the directory as it was."""
    beside = Path(config.out).parent
    before = {path: path.stat().st_mtime_ns for path in beside.rglob("*")}
    found = dry_run(config)
    assert {path: path.stat().st_mtime_ns for path in beside.rglob("*")} == before
    assert json.loads(json.dumps(found.as_data()))["name"] == found.name
    return found


def shown(found: DryRun) -> str:
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    planning.show(found, console)
    return console.export_text()


def test_parquet_is_exact(frame: pl.DataFrame, options: Options, tmp_path: Path) -> None:
    (tmp_path / "days").mkdir()
    frame[:3000].write_parquet(tmp_path / "days" / "a.parquet", row_group_size=500)
    frame[3000:].write_parquet(tmp_path / "days" / "b.parquet", row_group_size=500)
    found = looked(
        options(
            tmp_path / "days",
            num_shards=None,
            event_column="kind",
            event_weights={"view": 1, "cart": 3},
            time_from=START + 100 * 1700,
            rows_per_block=1000,
            object_store_bytes=1 << 27,
            num_cpus=3,
        )
    )
    assert found.schema == (
        Column("user", "user_id", "int64"),
        Column("item", "item_id", "int64"),
        Column("time", "timestamp", "number"),
        Column("event", "kind", "string"),
    )
    assert found.rows == Rows(3500, estimated=False)
    assert (found.pruned_rows, found.pruned_files) == (1500, 0)
    assert (found.files, found.formats, found.shards, found.read_tasks) == (2, {"parquet": 2}, 8, 4)
    assert found.bytes == sum(file.stat().st_size for file in (tmp_path / "days").iterdir())
    assert 0 < found.bytes_to_read < found.bytes
    assert (found.time_unit, found.times) == ("s", (START + 100 * 1500, START + 100 * 4999))
    sizes = {guess.what: guess.bytes for guess in found.estimates}
    assert sizes["shuffle"] == 3500 * (8 + 8 + 8 + 4 + 4)
    assert sizes["output"] == 3500 * (4 + 8 + 4)
    assert sizes["spill to disk"] == 0
    assert [step.stage for step in found.steps] == ["read", "order", "encode", "k-core", "write"]
    text = shown(found)
    for part in ("3,500", "1,500 rows by statistics", "2020-09-15T", "view 1, cart 3", "4 tasks", "32 bytes a row"):
        assert part in text
    assert "about 3,500" not in text


def test_what_does_not_fit_the_store_is_spilled(
    frame: pl.DataFrame, options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frame.write_parquet(tmp_path / "a.parquet")
    monkeypatch.setattr(planning, "store_bytes", lambda _: 40_000)
    sizes = {guess.what: guess.bytes for guess in looked(options(tmp_path / "a.parquet")).estimates}
    assert sizes["shuffle"] == 5000 * 28
    assert sizes["spill to disk"] == 5000 * 28 - 40_000


def test_rows_in_files_that_partitions_prune_are_not_known(
    frame: pl.DataFrame, options: Options, tmp_path: Path
) -> None:
    for day in ("2020-09-13", "2020-09-14"):
        directory = tmp_path / "log" / f"date={day}"
        directory.mkdir(parents=True)
        frame[:10].drop("timestamp").write_parquet(directory / "a.parquet")
    found = looked(options(tmp_path / "log", time_column="date", time_from="2020-09-14"))
    assert (found.pruned_files, found.rows, found.read_tasks) == (1, Rows(10, estimated=False), 1)


@pytest.mark.parametrize("name", ["log.csv", "log.csv.gz", "log.jsonl", "log.jsonl.gz"])
def test_text_is_estimated_and_says_so(name: str, frame: pl.DataFrame, options: Options, tmp_path: Path) -> None:
    plain = frame.write_csv() if ".csv" in name else frame.write_ndjson()
    (tmp_path / name).write_bytes(gzip.compress(plain.encode()) if name.endswith("gz") else plain.encode())
    found = looked(options(tmp_path / name))
    assert found.rows == Rows(5000, estimated=True)  # the head holds all of it
    assert found.times is None
    assert found.read_tasks == 1
    assert "about 5,000 (estimate" in shown(found)


def test_text_longer_than_its_head(
    frame: pl.DataFrame, options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "HEAD_BYTES", 10_000)
    (tmp_path / "log").mkdir()
    for number in range(40):
        frame[:1000].write_csv(tmp_path / "log" / f"{number:02d}.csv")
    found = looked(options(tmp_path / "log"))
    assert found.rows.estimated
    assert abs(found.rows.number - 40_000) < 2000


def test_a_split_by_time_is_told_in_the_unit_of_the_column(
    frame: pl.DataFrame, options: Options, tmp_path: Path
) -> None:
    frame.write_parquet(tmp_path / "a.parquet")
    found = looked(options(tmp_path / "a.parquet", split="time:2020-09-14,2020-09-15", min_count=3, max_history=50))
    write = found.steps[-1].does
    assert "split time (valid_from 1600041600, test_from 1600128000)" in write
    assert "min_count 3" in write
    assert "newest 50" in write


def test_appending_takes_over_the_parents_choices(options: Options, tmp_path: Path) -> None:
    write_prepared(tmp_path / "v1", histories(), num_shards=3)
    pl.DataFrame({"user_id": [100], "item_id": [10], "timestamp": [99]}).write_parquet(tmp_path / "new.parquet")
    config = PrepareConfig(
        source=str(tmp_path / "new.parquet"), out=str(tmp_path / "v2"), append_to=str(tmp_path / "v1")
    )
    found = looked(config)
    assert found.shards == 3
    assert found.parent is not None
    assert "users with 1 rows" in found.steps[3].does
    assert found.parent in shown(found)


def test_an_output_that_exists_is_refused_as_in_a_preparation(
    options: Options, log: Callable[..., str], tmp_path: Path
) -> None:
    path = log(user_id=[1], item_id=[1], timestamp=[1])
    (tmp_path / "there").mkdir()
    there = fsspec.filesystem("memory")
    there.pipe_file("/dry-run/manifest.json", b"{}")
    for out in (tmp_path / "there", "memory://dry-run"):
        messages = []
        for look in (dry_run, prepare):
            with pytest.raises(GenattError) as caught:
                look(options(path, out=out))
            messages.append(str(caught.value))
        assert messages == [f"output {out} exists already: choose another --out, or remove it first"] * 2
    there.rm("/dry-run", recursive=True)


def test_tasks_are_estimated_for_the_cpus_there_are(
    frame: pl.DataFrame, options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frame.write_parquet(tmp_path / "a.parquet")
    monkeypatch.setattr(planning, "cpus", lambda: 7)
    assert "7 tasks with" in shown(looked(options(tmp_path / "a.parquet")))


def test_no_secret_is_shown(options: Options, log: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    for check in ("check_access", "check_free"):  # both ask the store
        monkeypatch.setattr(planning, check, lambda _: None)
    path = log(user_id=[1], item_id=[1], timestamp=[1])
    found = dry_run(options(path, out="s3://key:hidden@bucket/out"))
    assert found.out == "s3://bucket/out"
    assert "hidden" not in json.dumps(found.as_data()) + shown(found)


def test_mistakes_show_as_in_a_preparation(options: Options, log: Callable[..., str]) -> None:
    path = log(user_id=[1], item_id=[1], timestamp=[1])
    with pytest.raises(GenattError, match=r"no column 'uid' in log\.parquet"):
        dry_run(options(path, user_column="uid"))
    with pytest.raises(GenattError, match="no rows in time_from=5"):
        dry_run(options(path, time_from=5))
    with pytest.raises(GenattError, match="split='2020-01-01' is a date"):
        dry_run(options(path, split="time:2020-01-01,2020-01-02"))
