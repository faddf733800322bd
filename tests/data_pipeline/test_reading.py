"""Sources and raw columns: what is found, how it is cast, and what is refused with which words. No Ray here."""

import datetime
import gzip
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest

from data_pipeline.config import PrepareConfig
from data_pipeline.errors import GenattError
from data_pipeline.readers import plan, read_chunk
from data_pipeline.sources import resolve
from data_pipeline.storage import redact

Log = Callable[..., str]
Options = Callable[..., PrepareConfig]


def read(config: PrepareConfig, tmp_path: Path) -> pl.DataFrame:
    planned = plan(resolve(config, tmp_path), config)
    return pl.concat([read_chunk(planned, chunk, config) for chunk in planned.chunks])


def refusal(config: PrepareConfig, tmp_path: Path) -> str:
    with pytest.raises(GenattError) as caught:
        read(config, tmp_path)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("ending", ["parquet", "csv", "csv.gz", "tsv"])
def test_formats_read_alike(ending: str, log: Log, options: Options, tmp_path: Path):
    plain = log("log.parquet", user_id=[1, 2], item_id=["x", "y"], timestamp=[30, 20], rating=[1.0, None])
    path = tmp_path / f"other.{ending}"
    frame = pl.read_parquet(plain)
    if ending == "parquet":
        frame.write_parquet(path)
    else:
        text = frame.write_csv(separator="\t" if ending == "tsv" else ",").encode()
        path.write_bytes(gzip.compress(text) if ending.endswith("gz") else text)
    rows = read(options(str(path)), tmp_path)
    assert rows.rows() == [(1, "x", 30, 0), (2, "y", 20, 1)]
    assert rows.dtypes == [pl.Int64, pl.String, pl.Int64, pl.Int64]


def test_row_groups_are_chunks_with_running_positions(log: Log, options: Options, tmp_path: Path):
    path = tmp_path / "log.parquet"
    pl.DataFrame({"user_id": range(10), "item_id": 1, "timestamp": 0}).write_parquet(path, row_group_size=2)
    config = options(str(path), rows_per_block=4)
    assert len(plan(resolve(config, tmp_path), config).chunks) == 3
    assert read(config, tmp_path)["position"].to_list() == list(range(10))


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        ([3.0, 1e15], [3, 10**15]),
        ([datetime.datetime(1970, 1, 1, 0, 0, 1), datetime.datetime(1970, 1, 1, 0, 0, 2)], [10**6, 2 * 10**6]),
        ([datetime.date(1970, 1, 3), datetime.date(1970, 1, 4)], [2, 3]),
    ],
)
def test_timestamps_become_integers(times: list, expected: list[int], log: Log, options: Options, tmp_path: Path):
    path = log(user_id=[1, 2], item_id=[1, 2], timestamp=times)
    assert read(options(path), tmp_path)["timestamp"].to_list() == expected


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        (["1700000000000000001", "2"], [1700000000000000001, 2]),  # would lose its last digits as a float
        (["1e3", "2.0"], [1000, 2]),
        (["1970-01-01T00:00:01", "1970-01-01T00:00:02"], [10**6, 2 * 10**6]),
    ],
)
def test_csv_timestamps_become_integers(times: list, expected: list[int], log: Log, options: Options, tmp_path: Path):
    path = log("log.csv", user_id=[1, 2], item_id=[1, 2], timestamp=times)
    assert read(options(path), tmp_path)["timestamp"].to_list() == expected


def test_csv_ids_with_leading_zeros_stay_text(log: Log, options: Options, tmp_path: Path):
    path = log("log.csv", user_id=["7", "007"], item_id=["1", "2"], timestamp=[1, 2])
    assert read(options(path), tmp_path)["user_id"].to_list() == ["7", "007"]


def test_id_type_string_keeps_ids_as_text(log: Log, options: Options, tmp_path: Path):
    path = log(user_id=[7], item_id=[8], timestamp=[1])
    assert read(options(path, id_type="string"), tmp_path).row(0) == ("7", "8", 1, 0)


def test_directory_with_interactions_also_gives_its_items(log: Log, options: Options, tmp_path: Path):
    log("set/interactions.parquet", user_id=[1], item_id=[1], timestamp=[1])
    log("set/items.parquet", item_id=[1], title=["one"])
    source = resolve(options(tmp_path / "set"), tmp_path)
    assert (source.name, [file.label for file in source.files]) == ("set", ["interactions.parquet"])
    assert source.items is not None


def test_glob_takes_files_in_the_order_of_their_names(log: Log, options: Options, tmp_path: Path):
    for name in ("b", "a", "c"):
        log(f"days/{name}.csv", user_id=[1], item_id=[1], timestamp=[1])
    source = resolve(options(f"{tmp_path}/days/*.csv"), tmp_path)
    assert [file.label for file in source.files] == ["a.csv", "b.csv", "c.csv"]


def test_credentials_are_kept_out(options: Options):
    assert redact("s3://key:secret@bucket/log?token=1") == "s3://bucket/log"
    assert options("s3://key:secret@bucket/log").recorded()["source"] == "s3://bucket/log"


def test_missing_file(options: Options, tmp_path: Path):
    assert "gone.parquet does not exist" in refusal(options(tmp_path / "gone.parquet"), tmp_path)


def test_unknown_source_name(options: Options, tmp_path: Path):
    message = refusal(options("ml-100"), tmp_path)
    assert "'ml-100'" in message
    assert "did you mean 'ml-100k'?" in message
    assert "synthetic" in message


def test_directory_without_data(options: Options, tmp_path: Path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "notes.txt").write_text("x")
    assert "no .parquet" in refusal(options(tmp_path / "set"), tmp_path)


def test_wrong_column(log: Log, options: Options, tmp_path: Path):
    message = refusal(options(log(user=[1], item_id=[1], timestamp=[1])), tmp_path)
    assert message == (
        "no column 'user_id' in log.parquet: did you mean 'user'? it has user, item_id, timestamp: set user_column"
    )


def test_empty_file(options: Options, tmp_path: Path):
    (tmp_path / "log.csv").touch()
    assert "log.csv is empty (0 bytes)" in refusal(options(tmp_path / "log.csv"), tmp_path)


@pytest.mark.parametrize("name", ["log.csv", "log.parquet"])
def test_no_rows(name: str, log: Log, options: Options, tmp_path: Path):
    assert "has no rows" in refusal(options(log(name, user_id=[], item_id=[], timestamp=[])), tmp_path)


def test_files_without_rows_beside_others_do_not_matter(log: Log, options: Options, tmp_path: Path):
    log("days/a.csv", user_id=[], item_id=[], timestamp=[])
    log("days/b.csv", user_id=["u"], item_id=[1], timestamp=[1])
    log("days/c.parquet", user_id=pl.Series([], dtype=pl.Int64), item_id=[], timestamp=[])
    config = options(tmp_path / "days")
    assert read(config, tmp_path).height == 1


def test_truncated_parquet(log: Log, options: Options, tmp_path: Path):
    path = Path(log(user_id=[1] * 1000, item_id=[1] * 1000, timestamp=[1] * 1000))
    path.write_bytes(path.read_bytes()[:-20])
    assert "log.parquet is no readable parquet file" in refusal(options(path), tmp_path)


def test_ragged_csv(options: Options, tmp_path: Path):
    (tmp_path / "log.csv").write_text("user_id,item_id,timestamp\n1,2,3\n1,2,3,4\n")
    assert "log.csv is no readable csv file" in refusal(options(tmp_path / "log.csv"), tmp_path)


@pytest.mark.parametrize("name", ["log.csv", "log.parquet"])
def test_nulls_in_ids(name: str, log: Log, options: Options, tmp_path: Path):
    message = refusal(options(log(name, user_id=[1, 2, 3, 4], item_id=[1, 2, None, None], timestamp=[1] * 4)), tmp_path)
    assert f"column 'item_id' of {name} has 2 nulls in rows 0 to 3" in message
    assert "first None at row 2" in message


@pytest.mark.parametrize("bad", [None, float("nan")])
def test_nulls_in_timestamps(bad: float | None, log: Log, options: Options, tmp_path: Path):
    message = refusal(options(log(user_id=[1, 2], item_id=[1, 2], timestamp=[1.0, bad])), tmp_path)
    assert "column 'timestamp' of log.parquet has 1 nulls or NaN" in message
    assert "at row 1" in message


def test_fractional_timestamps(log: Log, options: Options, tmp_path: Path):
    message = refusal(options(log(user_id=[1, 2], item_id=[1, 2], timestamp=[1.0, 1.5])), tmp_path)
    assert "1 values that are no whole number" in message
    assert "first 1.5 at row 1" in message


def test_mixed_types_between_files(log: Log, options: Options, tmp_path: Path):
    log("days/a.parquet", user_id=[1], item_id=[1], timestamp=[1])
    log("days/b.parquet", user_id=["u1"], item_id=[1], timestamp=[1])
    message = refusal(options(tmp_path / "days"), tmp_path)
    assert "column 'user_id' has mixed types: int64 in a.parquet, string in b.parquet" in message
    assert read(options(tmp_path / "days", id_type="string"), tmp_path)["user_id"].to_list() == ["1", "u1"]


def test_text_after_the_head_of_an_integer_csv_column(log: Log, options: Options, tmp_path: Path):
    users = [*range(200_000), "late"]
    message = refusal(options(log("log.csv", user_id=map(str, users), item_id=1, timestamp=1)), tmp_path)
    assert "first 'late' at row 200000" in message
    assert "id_type=string" in message


@pytest.mark.parametrize("column", ["user_id", "timestamp"])
def test_unusable_type(column: str, log: Log, options: Options, tmp_path: Path):
    columns = {"user_id": [1], "item_id": [1], "timestamp": [1]} | {column: [[1, 2]]}
    assert f"column {column!r} of log.parquet has type" in refusal(options(log(**columns)), tmp_path)
