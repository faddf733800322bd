"""Claims about sources on S3: what is found, how many requests that takes, and what happens to files that go wrong."""

import gzip
import io
from pathlib import Path

import polars as pl
import pytest

from data_pipeline.config import PrepareConfig
from data_pipeline.errors import GenattError
from data_pipeline.readers import parquet, plan, read_chunk
from data_pipeline.sources import resolve

pytestmark = pytest.mark.s3

DAYS = [f"2024-01-{day:02d}" for day in range(1, 9)]


def frame(day: int, rows: int = 100) -> pl.DataFrame:
    first = 1_704_067_200 + day * 86_400
    return pl.DataFrame(
        {
            "user_id": range(rows),
            "item_id": [f"i{row}" for row in range(rows)],
            "rating": [float(row % 5) for row in range(rows)],
            "timestamp": range(first, first + rows),
        }
    )


def parquet_bytes(rows: pl.DataFrame, **options) -> bytes:
    rows.write_parquet(stream := io.BytesIO(), **options)
    return stream.getvalue()


@pytest.fixture
def log(s3) -> str:
    """Eight days of a hundred rows, a file each, with what Spark leaves beside them."""
    for number, day in enumerate(DAYS):
        s3.put(f"log/date={day}/part-0.parquet", parquet_bytes(frame(number), row_group_size=25))
        s3.put(f"log/date={day}/_SUCCESS", b"")
    s3.put("log/_delta_log/0.json", b"{}")
    return f"{s3.url}/log"


def config(source: str, **changes) -> PrepareConfig:
    return PrepareConfig(source=source, out="unused", **changes)


def read(options: PrepareConfig) -> tuple:
    source = plan(resolve(options, Path("unused")), options)
    return source, pl.concat(part for chunk in source.chunks for part in read_chunk(source, chunk, options))


@pytest.mark.parametrize("pattern", ["", "/", "/*/*.parquet", "/**/part-?.parquet", "/date=*", "/date=2024-*[1-8]/*"])
def test_paths_and_globs_find_the_same_rows(pattern: str, log: str):
    source, rows = read(config(log + pattern))
    assert [dict(file.partition)["date"] for file in source.files] == DAYS
    expected = pl.concat([frame(day) for day in range(8)])
    assert rows.select("user_id", "item_id", "timestamp").equals(expected.drop("rating"))


def test_listing_takes_no_request_for_each_file(s3, faults):
    for number in range(60):
        s3.client.put_object(Bucket=s3.bucket, Key=f"log/day={number:03d}/x.parquet", Body=b"x" * (number + 1))
    for pattern in ("", "/*/*.parquet", "/**/*.parquet"):
        faults.reset()
        files = resolve(config(f"{s3.url}/log{pattern}"), Path("unused")).files
        assert [file.bytes for file in files] == list(range(1, 61))
        assert len(faults.requests) <= 8


def test_a_file_is_a_request_for_its_footer_and_a_round_for_its_columns(log: str, faults):
    options = config(log)
    source = plan(resolve(options, Path("unused")), options)
    assert faults.count("GET", "log/*.parquet") == 8
    read_whole = list(read_chunk(source, source.chunks[0], options))
    assert read_whole[0].height == 100
    assert faults.count("GET", "log/*.parquet") <= 8 + 2  # its columns, near enough to be one range, and its footer
    assert faults.count("HEAD", "log/*.parquet") == 0


def test_only_what_is_in_the_range_is_asked_for(log: str, faults):
    source, rows = read(config(log, time_column="date", time_from="2024-01-03", time_to="2024-01-05"))
    assert (source.pruned_files, source.rows, rows.height) == (6, 200, 200)
    asked = {request.key for request in faults.requests if request.key.endswith("parquet")}
    assert asked == {"log/date=2024-01-03/part-0.parquet", "log/date=2024-01-04/part-0.parquet"}


def test_row_groups_outside_the_range_are_not_asked_for(log: str, faults):
    first = 1_704_067_200 + 2 * 86_400
    source, rows = read(config(log, time_from="2024-01-03", time_to=first + 30))
    assert (source.rows, source.pruned_rows) == (50, 750)
    assert rows["user_id"].to_list() == list(range(50))
    assert faults.count("GET", "log/*.parquet") == 8 + 2  # all footers, and one round for the two row groups


def test_busy_store_is_asked_again(log: str, faults):
    faults.fail(next_n=5)
    _, rows = read(config(log))
    assert rows.height == 800
    assert faults.failed == 5


def test_file_that_vanishes_after_the_listing(log: str, faults):
    options = config(log)
    found = resolve(options, Path("unused"))
    faults.vanish("log/date=2024-01-02/part-0.parquet")
    with pytest.raises(GenattError, match=r"date=2024-01-02/part-0\.parquet") as caught:
        plan(found, options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("streamed", [False, True])
def test_file_that_vanishes_after_its_footer(streamed: bool, log: str, faults, monkeypatch):
    if streamed:
        monkeypatch.setattr(parquet, "MEMORY_BYTES", 1)
    options = config(log)
    source = plan(resolve(options, Path("unused")), options)
    faults.vanish("log/date=2024-01-02/part-0.parquet")
    assert sum(part.height for part in read_chunk(source, source.chunks[0], options)) == 100
    with pytest.raises(GenattError, match=r"date=2024-01-02/part-0\.parquet"):
        list(read_chunk(source, source.chunks[1], options))


def test_truncated_file(log: str, s3):
    s3.truncate("log/date=2024-01-05/part-0.parquet")
    with pytest.raises(GenattError, match=r"date=2024-01-05/part-0\.parquet is no readable parquet file"):
        read(config(log))


@pytest.mark.parametrize("ending", ["csv", "csv.gz", "ndjson", "ndjson.gz"])
def test_text_is_streamed(ending: str, s3, faults):
    rows = frame(0, 60_000)
    content = (rows.write_csv() if "csv" in ending else rows.write_ndjson()).encode()
    url = s3.put(f"log.{ending}", gzip.compress(content) if ending.endswith("gz") else content)
    faults.cut(next_n=1, key=f"log.{ending}")
    source, read_rows = read(config(url, rows_per_block=10_000))
    assert read_rows.select("user_id", "item_id", "timestamp").equals(rows.drop("rating"))
    assert (source.time_unit, source.rows) == ("s", None)


def test_secrets_stay_out_of_messages(s3, monkeypatch):
    secret = s3.environment["AWS_SECRET_ACCESS_KEY"]
    for source in (f"{s3.url}/none/", f"{s3.url}/none/*.parquet", "s3://no-such-bucket-here/log"):
        with pytest.raises(GenattError) as caught:
            resolve(config(source), Path("unused"))
        assert source.split("/")[2] in str(caught.value)
        assert secret not in str(caught.value)
        assert "\n" not in str(caught.value)
