"""The ingest benchmark: its Polars script is right, its comparison finds differences, its verdict is computed."""

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from log_reference import Row, prepare_slowly

from benchmarks.ingest import __main__ as ingest
from benchmarks.ingest import run
from benchmarks.ingest.compare import difference
from benchmarks.ingest.server import S3Server
from data_pipeline.config import PrepareConfig
from data_pipeline.format import INDEX, SHARD, VOCABULARY

ROOT = Path(__file__).parents[2]
NUM_SHARDS = 3


def random_log(in_order: bool, text: bool) -> list[Row]:
    """Few times, so that many rows of a user are at the same; popular and rare items; active and idle users."""
    rng = np.random.default_rng(7)
    times = rng.integers(0, 40, 600)
    rows = zip(
        (rng.zipf(1.3, 600) % 60).tolist(),
        (rng.zipf(1.4, 600) % 90).tolist(),
        (np.sort(times) if in_order else times).tolist(),
        strict=True,
    )
    return [(f"u{user}" if text else user, f"i{item}" if text else item, time) for user, item, time in rows]


def reference(source: str, out: Path, environment: dict[str, str] | None = None) -> dict:
    """What the script prints, run as the benchmark does; row groups of four users."""
    command = [sys.executable, "-m", "benchmarks.ingest.polars_reference", "--source", source, "--out", str(out)]
    command += ["--num-shards", str(NUM_SHARDS), "--row-group-size", "4", "--min-user", "5", "--min-item", "4"]
    done = subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True, timeout=60)
    return json.loads(done.stdout)


def write_log(rows: list[Row], path: Path) -> None:
    """In two files."""
    frame = pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp"], orient="row")
    frame[:250].write_parquet(path / "log-0.parquet")
    frame[250:].write_parquet(path / "log-1.parquet")


@pytest.mark.parametrize("in_order", [True, False], ids=["in the order of time", "in no order"])
@pytest.mark.parametrize("text", [False, True], ids=["integer ids", "text ids"])
def test_script_equals_plain_python(in_order: bool, text: bool, tmp_path: Path) -> None:
    rows = random_log(in_order, text)
    write_log(rows, tmp_path)
    expected = prepare_slowly(rows, PrepareConfig(source="log", out="out", min_item_interactions=4))
    assert expected.sequences
    said = reference(str(tmp_path / "log-*.parquet"), tmp_path / "out")

    assert (said["rows_in"], said["rows_in"] - said["rows_out"]) == (len(rows), expected.dropped["core"])
    assert said["seconds"] == pytest.approx(sum(said["steps"].values()), abs=0.02)
    shards = [pl.read_parquet(file) for file in sorted((tmp_path / "out").glob("shards/*"))]
    found = {user: (items, times) for shard in shards for user, items, times in shard.iter_rows()}
    assert found == expected.sequences
    assert pl.read_parquet(tmp_path / "out" / VOCABULARY).rows() == expected.items
    indexes = [pl.read_parquet(file) for file in sorted((tmp_path / "out").glob("index/*"))]
    for shard, index in zip(shards, indexes, strict=True):
        lengths = shard["item_ids"].list.len().to_list()
        assert index.rows() == [(length, length - 2, length - 2, length - 1) for length in lengths]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the script made of a log."""
    path = tmp_path_factory.mktemp("written")
    write_log(random_log(in_order=True, text=False), path)
    reference(str(path / "log-*.parquet"), path / "out")
    return path / "out"


def other_sequence(path: Path) -> None:
    file = path / SHARD.format(0)
    shard = pl.read_parquet(file)
    reversed_first = pl.when(pl.int_range(pl.len()) == 0).then(pl.col("item_ids").list.reverse()).otherwise("item_ids")
    shard.with_columns(item_ids=reversed_first).write_parquet(file, row_group_size=4)


def other_index(path: Path) -> None:
    file = path / INDEX.format(0)
    pl.read_parquet(file).with_columns(pl.col("valid") - 1).write_parquet(file, row_group_size=4)


def other_row_groups(path: Path) -> None:
    file = path / SHARD.format(0)
    pl.read_parquet(file).write_parquet(file, row_group_size=5)


def other_count(path: Path) -> None:
    file = path / VOCABULARY
    pl.read_parquet(file).with_columns(pl.col("train_count") + 1).write_parquet(file)


def lost_user(path: Path) -> None:
    for name in (SHARD, INDEX):
        file = path / name.format(1)
        pl.read_parquet(file)[:-1].write_parquet(file, row_group_size=4)


def lost_file(path: Path) -> None:
    (path / SHARD.format(1)).unlink()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (other_sequence, "shards/part-00000.parquet: row"),
        (other_index, "shards/part-00000.parquet: row"),
        (other_row_groups, "shards/part-00000.parquet: [4"),
        (other_count, "vocabulary/items.parquet: row 0"),
        (lost_user, "index/part-00001.parquet: ["),
        (lost_file, "has no shards/part-00001.parquet"),
    ],
)
def test_every_difference_is_found(change: Callable[[Path], None], said: str, written: Path, tmp_path: Path) -> None:
    subprocess.run(["cp", "-r", written, tmp_path / "copy"], check=True)
    assert difference(written, tmp_path / "copy") is None
    change(tmp_path / "copy")
    assert said in (difference(written, tmp_path / "copy") or "")


def test_order_of_users_in_a_file_is_no_difference(written: Path, tmp_path: Path) -> None:
    subprocess.run(["cp", "-r", written, tmp_path / "copy"], check=True)
    for name in (SHARD, INDEX):
        file = tmp_path / "copy" / name.format(0)
        pl.read_parquet(file).reverse().write_parquet(file, row_group_size=4)
    assert difference(written, tmp_path / "copy") is None


SETTING = run.Setting(
    rows=(10, 40),
    users=2,
    items=5,
    rounds=4,
    cores=1,
    rows_per_file=4,
    rows_per_shard=5,
    reference_rows=10,
    object_store_bytes=None,
    limit=60.0,
)


def test_each_round_begins_with_the_one_that_ended_the_last() -> None:
    orders = [SETTING.order(10, number) for number in range(4)]
    assert orders == [("ours", "polars"), ("polars", "ours")] * 2
    assert SETTING.order(40, 1) == ("ours",)  # too large for the reference
    assert SETTING.options(10).files == 3


@pytest.mark.parametrize(("ours", "peak", "met"), [(2.0, 120, True), (2.01, 121, False)])
def test_verdict_follows_from_the_rows(ours: float, peak: int, met: bool) -> None:
    def turn(seconds: float, peak: int) -> dict:
        return {"seconds": seconds, "peak_bytes": peak, "ray_start_seconds": 9.0}

    rows = [
        {"rows": 10, "ours": turn(ours, 100), "polars": turn(1.0, 50)},
        {"rows": 10, "ours": turn(ours, 90), "polars": turn(1.0, 50)},
        {"rows": 40, "ours": turn(8.0, peak)},
    ]
    result = run.summary(rows)
    assert result["verdict"] == {
        "ratio": {"value": ours, "target": 2.0, "met": met},
        "peak_memory_growth": {"value": peak / 100, "target": 1.2, "met": met},
    }
    assert result["medians"]["10"]["ours_seconds"] == ours
    assert run.summary(rows[:1])["verdict"].keys() == {"ratio"}  # one size: nothing grows


def test_different_results_are_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def turn(name: str, rows: int, *_: object) -> dict:
        return {"rows_in": rows, "rows_out": rows - (name == "ours"), "seconds": 1.0}

    monkeypatch.setattr(run, "_turn", turn)
    with pytest.raises(run.MismatchError, match=r"\(10, 9\) of ours, \(10, 10\) of polars"):
        run._round(SETTING, 10, 0, None)  # type: ignore[arg-type]

    def measure(_: run.Setting) -> list:
        raise run.MismatchError("as above")

    monkeypatch.setattr(ingest, "measure", measure)
    monkeypatch.setattr(ingest, "use_cores", lambda count: count)
    monkeypatch.setattr(sys, "argv", ["ingest", "--out", str(tmp_path / "out.json")])
    assert ingest.main() == 1
    assert "the results differ: as above" in capsys.readouterr().err
    assert not (tmp_path / "out.json").exists()


def test_a_thinned_line_keeps_its_peak() -> None:
    line = [(float(second), (second == 333) * 2**30) for second in range(500)]
    thinned = run._thinned(line)
    assert len(thinned) <= run.LINE_POINTS
    assert [333.0, 1024] in thinned
    assert run._thinned([]) == []


@pytest.mark.s3
def test_server_counts_what_the_script_reads(tmp_path: Path) -> None:
    write_log(random_log(in_order=True, text=False), tmp_path)
    with S3Server() as server, run._environment(server.environment):
        store, _ = run.filesystem(run.LOG)
        store.mkdir(run.BUCKET)
        for file in tmp_path.glob("*.parquet"):
            store.pipe_file(f"{run.BUCKET}/log/{file.name}", file.read_bytes())
        before = server.served()
        reference(f"{run.LOG}/log-*.parquet", tmp_path / "remote", dict(run.os.environ))
        after = server.served()
    assert after["requests"] - before["requests"] >= 3  # a listing and two files
    sizes = sum(file.stat().st_size for file in tmp_path.glob("*.parquet"))
    assert sizes / 2 < after["bytes"] - before["bytes"] < 3 * sizes + 4096
    reference(str(tmp_path / "log-*.parquet"), tmp_path / "local")
    assert difference(tmp_path / "local", tmp_path / "remote") is None


@pytest.mark.exhaustive
@pytest.mark.s3
@pytest.mark.ray
def test_benchmark_runs_from_end_to_end(tmp_path: Path) -> None:
    out = tmp_path / "ingest.json"
    command = [sys.executable, "-m", "benchmarks.ingest", "--rows", "30000", "60000", "--rounds", "1"]
    command += ["--users", "1500", "--items", "400", "--rows-per-file", "20000", "--rows-per-shard", "15000"]
    subprocess.run([*command, "--out", str(out), "--limit", "200"], cwd=ROOT, check=True, timeout=280)
    result = json.loads(out.read_text())
    small, large = result["rows"]
    assert small["equal"]
    assert "polars" not in large
    for row in (small, large):
        assert row["ours"]["rows_in"] == row["rows"]
        assert row["ours"]["files"] == 2 * math.ceil(row["rows"] / 15000) + 1
        assert row["ours"]["s3_bytes"] > 0
        assert {"driver", "worker", "raylet"} <= row["ours"]["cpu_seconds"].keys()
        assert max(size for _, size in row["ours"]["line"]) == round(row["ours"]["peak_bytes"] / 2**20)
    assert small["ratio"] == pytest.approx(small["ours"]["seconds"] / small["polars"]["seconds"], abs=1e-3)
    assert result["verdict"]["peak_memory_growth"]["met"] == (result["verdict"]["peak_memory_growth"]["value"] <= 1.2)
    assert out.with_suffix(".png").stat().st_size > 10_000
