"""Raw columns: how they are cast, what is refused with which words, and what a time range leaves out. No Ray here."""

import datetime
import decimal
import gzip
import io
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import polars as pl
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data_pipeline import storage
from data_pipeline.config import PrepareConfig
from data_pipeline.errors import GenattError
from data_pipeline.readers import Plan, in_unit, parquet, plan, read_chunk, text
from data_pipeline.sources import resolve
from data_pipeline.storage import redact

Log = Callable[..., str]
Options = Callable[..., PrepareConfig]


def planned(config: PrepareConfig, tmp_path: Path) -> Plan:
    return plan(resolve(config, tmp_path), config)


def read(config: PrepareConfig, tmp_path: Path) -> pl.DataFrame:
    planned = plan(resolve(config, tmp_path), config)
    return pl.concat([frame for chunk in planned.chunks for frame in read_chunk(planned, chunk, config)])


def refusal(config: PrepareConfig, tmp_path: Path) -> str:
    with pytest.raises(GenattError) as caught:
        read(config, tmp_path)
    message = str(caught.value)
    assert "\n" not in message
    return message


def write(frame: pl.DataFrame, path: Path, row_group_size: int | None = None) -> None:
    """In the format that the ending of `path` says."""
    name, packed = path.name.removesuffix(".gz"), path.name.endswith(".gz")
    path.parent.mkdir(parents=True, exist_ok=True)
    if name.endswith("parquet"):
        frame.write_parquet(path, row_group_size=row_group_size)
        return
    if name.endswith("json"):
        content = "".join(json.dumps(row) + "\n" for row in frame.to_dicts())
    else:
        content = frame.write_csv(separator="\t" if name.endswith("tsv") else ",")
    path.write_bytes(gzip.compress(content.encode()) if packed else content.encode())


ENDINGS = ["parquet", "csv", "csv.gz", "tsv", "tsv.gz", "ndjson", "json", "json.gz"]


@pytest.mark.parametrize("ending", ENDINGS)
def test_formats_read_alike(ending: str, options: Options, tmp_path: Path):
    frame = pl.DataFrame({"user_id": [1, 2], "item_id": ["x", "y"], "timestamp": [30, 20], "rating": [1.0, None]})
    path = tmp_path / f"other.{ending}"
    write(frame, path)
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


def table(path: Path, **columns: pa.Array) -> Path:
    """A Parquet file with columns of exactly these types; the ones not given are integers."""
    rows = len(next(iter(columns.values())))
    plain = {name: pa.array(range(rows)) for name in ("user_id", "item_id", "timestamp")}
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({**plain, **columns}), path)
    return path


# --- all rows, each once, in order ---------------------------------------------------------------------------------

IDS = st.one_of(
    st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=40),
    st.lists(st.text('ab"\n\r,\t é007.-', min_size=1), min_size=1, max_size=40),
)


@settings(max_examples=100, deadline=None)
@example(ids=["0"], ending="ndjson", cut=0, row_group_size=1, rows_per_block=1)  # JSON quotes it: text
@given(
    ids=IDS,
    ending=st.sampled_from(ENDINGS),
    cut=st.integers(0, 40),
    row_group_size=st.integers(1, 20),
    rows_per_block=st.integers(1, 50),
)
def test_every_row_is_read_once_and_as_it_was(
    ids: list, ending: str, cut: int, row_group_size: int, rows_per_block: int
):
    """Ids are kept as written, whatever is in them, over files, row groups and blocks of any size."""
    with tempfile.TemporaryDirectory() as directory:
        if ending.startswith(("csv", "tsv")) and isinstance(ids[0], str):
            ids = ["u" + one for one in ids]  # `7` is an integer in CSV: tested below
        frame = pl.DataFrame({"user_id": ids, "item_id": range(len(ids)), "timestamp": range(len(ids), 0, -1)})
        parts = [part for part in (frame[:cut], frame[cut:]) if part.height]
        for number, part in enumerate(parts):
            write(part, Path(directory) / f"{number}.{ending}", row_group_size)
        config = PrepareConfig(source=directory, out="unused", rows_per_block=rows_per_block)
        planned = plan(resolve(config, Path(directory)), config)
        frames = [frame for chunk in planned.chunks for frame in read_chunk(planned, chunk, config)]
    assert max(frame.height for frame in frames) <= rows_per_block
    positions = [number * 2**40 + row for number, part in enumerate(parts) for row in range(part.height)]
    expected = zip(ids, range(len(ids)), range(len(ids), 0, -1), positions, strict=True)
    assert pl.concat(frames).rows() == list(expected)
    assert planned.rows == (len(ids) if ending == "parquet" else None)


@pytest.mark.parametrize("ending", ["csv", "json.gz", "parquet"])
def test_large_files_are_read_in_pieces(ending: str, options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(text, "BLOCK_BYTES", 1 << 14)
    monkeypatch.setattr(text, "HEAD_BYTES", 1 << 10)
    rows = 20_000
    frame = pl.DataFrame({"user_id": range(rows), "item_id": ['a"\n'] * rows, "timestamp": range(rows)})
    write(frame, tmp_path / f"log.{ending}")
    config = options(tmp_path / f"log.{ending}", rows_per_block=3000)
    (chunk,) = (source := planned(config, tmp_path)).chunks
    frames = list(read_chunk(source, chunk, config))
    assert len(frames) >= 7
    assert pl.concat(frames)["user_id"].to_list() == list(range(rows))
    assert pl.concat(frames)["item_id"].unique().to_list() == ['a"\n']


def test_small_files_share_a_task(log: Log, options: Options, tmp_path: Path):
    for number, rows in enumerate((10, 20, 30, 25, 100, 5, 0, 5)):
        log(f"log/{number}.parquet", user_id=range(rows), item_id=range(rows), timestamp=range(rows))
    source = planned(options(tmp_path / "log", rows_per_block=60), tmp_path)
    assert [[source.chunks[chunk].rows for chunk in task] for task in source.tasks] == [
        [10, 20, 30],
        [25],
        [100],
        [5, 5],
    ]
    assert [chunk for task in source.tasks for chunk in task] == list(range(len(source.chunks)))
    for number in range(8):
        log(f"log/{number}.csv", user_id=range(100), item_id=range(100), timestamp=range(100))
    source = planned(options(f"{tmp_path}/log/*.csv", rows_per_block=60), tmp_path)
    assert [chunk for task in source.tasks for chunk in task] == list(range(8))
    assert 2 < len(source.tasks) < 8


def test_gzip_of_several_members(options: Options, tmp_path: Path):
    parts = [b"user_id,item_id,timestamp\n", b"1,2,3\n4,", b"5,6\n"]
    (tmp_path / "log.csv.gz").write_bytes(b"".join(map(gzip.compress, parts)))
    assert read(options(tmp_path / "log.csv.gz"), tmp_path).select("user_id", "item_id").rows() == [(1, 2), (4, 5)]


@pytest.mark.parametrize("name", ["log.csv.gz", "log.json.gz"])
def test_truncated_gzip(name: str, options: Options, tmp_path: Path):
    frame = pl.DataFrame({"user_id": range(1000), "item_id": range(1000), "timestamp": range(1000)})
    write(frame, tmp_path / name)
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-100])
    assert f"{name} is no readable" in refusal(options(tmp_path / name), tmp_path)


# --- remote Parquet ------------------------------------------------------------------------------------------------


@pytest.fixture
def remote(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[MemoryFileSystem, list]]:
    """A store in memory that is not this machine's disk, and the ranges that are asked of it."""
    fs, asked = fsspec.filesystem("memory"), []
    plain = storage.read_ranges

    def read_ranges(path: str, ranges: Any) -> list[bytes]:
        asked.append((path, list(ranges)))
        return plain(path, ranges)

    monkeypatch.setattr(storage, "read_ranges", read_ranges)
    fs.store.clear()
    yield fs, asked
    fs.store.clear()


def wide(rows: int, **options: Any) -> bytes:
    """A Parquet file whose needed columns lie between large ones that are not needed."""
    noise = pa.array([str(hash(str(row))) * 20 for row in range(rows)])
    columns = {"a": noise, "user_id": range(rows), "b": noise, "item_id": range(rows), "timestamp": range(rows)}
    pq.write_table(pa.table(columns), stream := io.BytesIO(), use_dictionary=False, compression="none", **options)
    return stream.getvalue()


def test_chunk_of_a_remote_file_is_one_round_of_ranges_of_its_columns(remote: tuple, options: Options, tmp_path: Path):
    fs, asked = remote
    content = wide(9000, row_group_size=1000)
    fs.pipe_file("/log/x.parquet", content)
    config = options("memory://log/x.parquet", rows_per_block=3000)
    source = planned(config, tmp_path)
    assert len(asked) == 1  # the footer
    assert [chunk.rows for chunk in source.chunks] == [3000] * 3
    assert source.bytes < len(content) / 10
    frames = [list(read_chunk(source, chunk, config)) for chunk in source.chunks]
    assert len(asked) == 4
    assert pl.concat(frame for part in frames for frame in part)["position"].to_list() == list(range(9000))


def test_large_remote_chunks_are_streamed(
    remote: tuple, options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    fs, asked = remote
    monkeypatch.setattr(parquet, "MEMORY_BYTES", 1000)
    fs.pipe_file("/log/x.parquet", wide(5000))
    config = options("memory://log/x.parquet", rows_per_block=700)
    rows = read(config, tmp_path)
    assert rows["user_id"].to_list() == list(range(5000))
    assert len(asked) == 1


def test_footer_larger_than_the_first_request(
    remote: tuple, options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    fs, asked = remote
    monkeypatch.setattr(parquet, "FOOTER_BYTES", 100)
    fs.pipe_file("/log/x.parquet", wide(100))
    assert read(options("memory://log/x.parquet"), tmp_path).height == 100
    assert len(asked) == 3


@pytest.mark.parametrize("content", [b"no parquet at all", b"PAR1" * 30, wide(50)[:-9], wide(50)[20:], b"x"])
def test_damaged_remote_parquet(content: bytes, remote: tuple, options: Options, tmp_path: Path):
    remote[0].pipe_file("/log/x.parquet", content)
    message = refusal(options("memory://log/x.parquet"), tmp_path)
    assert "x.parquet" in message
    assert "write it again" in message or "let nothing change the source" in message


@pytest.mark.parametrize("place", ["memory://log/x.parquet", "{tmp_path}/x.parquet"])
def test_file_replaced_after_it_was_looked_at(place: str, remote: tuple, options: Options, tmp_path: Path):
    path = place.format(tmp_path=tmp_path)
    config = options(path)
    storage.write_bytes(path, wide(5000))
    source = planned(config, tmp_path)
    storage.write_bytes(path, wide(4000))
    with pytest.raises(GenattError, match=r"x\.parquet (had 5000 rows|is no readable parquet file)"):
        list(read_chunk(source, source.chunks[0], config))


@pytest.mark.parametrize("name", ["x.parquet", "x.csv", "x.json.gz"])
@pytest.mark.parametrize("place", ["memory://log", "{tmp_path}"])
def test_file_that_vanished_after_it_was_looked_at(
    name: str, place: str, remote: tuple, options: Options, tmp_path: Path
):
    write(pl.DataFrame({"user_id": [1], "item_id": [1], "timestamp": [1]}), tmp_path / "made" / name)
    path = f"{place.format(tmp_path=tmp_path)}/{name}"
    storage.write_bytes(path, (tmp_path / "made" / name).read_bytes())
    config = options(path)
    source = planned(config, tmp_path)
    fs, inner = storage.filesystem(path)
    fs.rm(inner)
    with pytest.raises(GenattError, match=name):
        list(read_chunk(source, source.chunks[0], config))


# --- types of columns ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        (pa.array([1, -2], pa.int32()), [1, -2]),
        (pa.array([1, 2], pa.uint64()), [1, 2]),
        (pa.array([1, 2**62], pa.uint64()), [1, 2**62]),
        (pa.array([decimal.Decimal(7), decimal.Decimal(-8)], pa.decimal128(20, 0)), [7, -8]),
        (pa.array([5, 6]).dictionary_encode(), [5, 6]),
        (pa.array(["a", "b"]).dictionary_encode(), ["a", "b"]),
        (pa.array(["a", "007"], pa.large_string()), ["a", "007"]),
        (pa.array(["a", "007"], pa.string_view()), ["a", "007"]),
    ],
)
def test_types_of_ids(ids: pa.Array, expected: list, options: Options, tmp_path: Path):
    path = table(tmp_path / "log.parquet", user_id=ids)
    assert read(options(path), tmp_path)["user_id"].to_list() == expected
    assert read(options(path, id_type="string"), tmp_path)["user_id"].to_list() == [str(one) for one in expected]


@pytest.mark.parametrize(
    "ids",
    [
        pa.array([True, False]),
        pa.array([b"a", b"b"]),
        pa.array([decimal.Decimal("1.5"), decimal.Decimal(2)]),
        pa.array([1, 2], pa.decimal256(50, 0)),
        pa.array([[1], [2]]),
        pa.array([{"a": 1}, {"a": 2}]),
        pa.array([datetime.date(2024, 1, 1)] * 2),
    ],
)
def test_types_that_are_no_ids(ids: pa.Array, options: Options, tmp_path: Path):
    path = table(tmp_path / "log.parquet", item_id=ids)
    type_ = pq.read_schema(path).field("item_id").type
    assert refusal(options(path), tmp_path) == (
        f"column 'item_id' of log.parquet has type {type_}: ids must be integers or strings: cast it first"
    )


def test_ids_beyond_64_bits(options: Options, tmp_path: Path):
    path = table(tmp_path / "log.parquet", user_id=pa.array([1, 2**63, 2**64 - 1], pa.uint64()))
    message = refusal(options(path), tmp_path)
    assert "2 values that are no 64-bit integer" in message
    assert "first 9223372036854775808 at row 1: set id_type=string" in message
    assert read(options(path, id_type="string"), tmp_path)["user_id"][2] == str(2**64 - 1)


def test_widths_of_integers_are_no_drift(options: Options, tmp_path: Path):
    for number, type_ in enumerate((pa.int8(), pa.int32(), pa.int64(), pa.uint32())):
        table(tmp_path / "log" / f"{number}.parquet", user_id=pa.array([number], type_))
    assert read(options(tmp_path / "log"), tmp_path)["user_id"].to_list() == [0, 1, 2, 3]


def test_negative_ids_are_ids(log: Log, options: Options, tmp_path: Path):
    for name in ("log.parquet", "log.csv"):
        path = log(name, user_id=[-1, -(2**63)], item_id=[0, -2], timestamp=[1, 2])
        assert read(options(path), tmp_path).select("user_id", "item_id").rows() == [(-1, 0), (-(2**63), -2)]


@pytest.mark.parametrize(
    ("ids", "found"),
    [
        ([1.0, 2.0, 3.0], "all of its first 3 values are whole numbers"),
        ([1.0, None, 3.0], "1 of its first 3 values are null, NaN or fractions, first None at row 1"),
        ([1.0, 2.0, float("nan")], "1 of its first 3 values are null, NaN or fractions, first nan at row 2"),
        ([1.0, 2.5, None], "2 of its first 3 values are null, NaN or fractions, first 2.5 at row 1"),
    ],
)
def test_floats_are_no_ids(ids: list, found: str, options: Options, tmp_path: Path):
    message = refusal(options(table(tmp_path / "log.parquet", user_id=pa.array(ids, pa.float64()))), tmp_path)
    assert message == (
        f"column 'user_id' of log.parquet has type double: {found}: ids must be integers or strings: drop rows without "
        "an id and cast it to int64 (pandas makes floats of integers where some are missing)"
    )


def test_floats_are_no_ids_in_csv(log: Log, options: Options, tmp_path: Path):
    path = log("log.csv", user_id=["1.0", "2.0"], item_id=[1, 2], timestamp=[1, 2])
    assert "column 'user_id' of log.csv holds ids like 1.0: write them as integers" in refusal(options(path), tmp_path)
    assert read(options(path, id_type="string"), tmp_path)["user_id"].to_list() == ["1.0", "2.0"]


@pytest.mark.parametrize("written", ["007", "+7", "-0", "00"])
def test_text_that_would_change_as_an_integer_after_the_head(
    written: str, log: Log, options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(text, "HEAD_BYTES", 100)
    path = log("log.csv", user_id=[*map(str, range(50)), written], item_id=1, timestamp=1)
    message = refusal(options(path), tmp_path)
    assert (
        f"1 values that are no 64-bit integer in rows 0 to 50 (counted from 0), first {written!r} at row 50" in message
    )


def test_column_missing_in_one_file(log: Log, options: Options, tmp_path: Path):
    log("log/a.parquet", user_id=[1], item_id=[1], timestamp=[1])
    log("log/b.parquet", user_id=[1], item=[1], timestamp=[1])
    assert refusal(options(tmp_path / "log"), tmp_path) == (
        "no column 'item_id' in b.parquet: did you mean 'item'? it has user_id, item, timestamp: set item_column"
    )


@pytest.mark.parametrize("ending", ["csv", "parquet"])
@pytest.mark.parametrize("name", ["item_id", "timestamp"])
def test_column_twice(name: str, ending: str, options: Options, tmp_path: Path):
    path = tmp_path / f"log.{ending}"
    columns = pa.table([pa.array([1])] * 4, ["user_id", "item_id", "timestamp", name])
    pq.write_table(columns, path) if ending == "parquet" else pyarrow.csv.write_csv(columns, path)
    assert refusal(options(path), tmp_path) == f"log.{ending} has 2 columns {name!r}: rename all but one"


@pytest.mark.parametrize("name", ["log.csv.gz", "log.json.gz"])
@pytest.mark.parametrize(
    "content",
    [b"no gzip at all", gzip.compress(b"user_id\n") + b"what is this"],
    ids=["no gzip", "more behind it"],
)
def test_what_is_no_gzip(content: bytes, name: str, options: Options, tmp_path: Path):
    (tmp_path / name).write_bytes(content)
    assert f"{name} is no readable" in refusal(options(tmp_path / name), tmp_path)


def test_empty_lines_before_the_names_of_columns(options: Options, tmp_path: Path):
    (tmp_path / "log.csv").write_text("\n\r\nuser_id,item_id,timestamp\n1,2,3\n")
    assert read(options(tmp_path / "log.csv"), tmp_path).row(0) == (1, 2, 3, 0)


def test_names_of_columns_alone(options: Options, tmp_path: Path):
    (tmp_path / "log.csv").write_text("user_id,item_id,timestamp")
    assert "no rows" in refusal(options(tmp_path / "log.csv"), tmp_path)


@pytest.mark.parametrize("head_bytes", [1 << 20, 200])
@pytest.mark.parametrize("rows_before", [1, 50])
def test_quotes_that_are_never_closed_hide_no_rows(
    rows_before: int, head_bytes: int, options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(text, "HEAD_BYTES", head_bytes)
    rows = ["user_id,item_id,timestamp,title", *["1,2,3,x"] * rows_before, '1,2,3,"TV 32', *["1,2,3,x"] * 100]
    (tmp_path / "log.csv").write_text("\n".join(rows))
    assert "log.csv ends inside quotes" in refusal(options(tmp_path / "log.csv"), tmp_path)


def test_quotes_inside_fields_are_characters(options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(text, "HEAD_BYTES", 200)
    rows = ["user_id,item_id,timestamp,title", '1,2,3,TV 32" flat', *['1,2,3,"a\nb,"""'] * 100]
    (tmp_path / "log.csv").write_text("\n".join(rows))
    assert len(read(options(tmp_path / "log.csv"), tmp_path)) == 101


def test_values_are_shown_in_part(options: Options, tmp_path: Path):
    (tmp_path / "log.csv").write_text("user_id,item_id,timestamp\n1,2,3\n" + "x" * 1_500_000 + ",2,3\n")
    message = refusal(options(tmp_path / "log.csv"), tmp_path)
    assert "first 'xxx" in message
    assert len(message) < 400


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("log.csv", b'user_id,item_id,timestamp\n"1,2,3\n' + b"4,5,6\n" * 100),
        ("log.csv", b"x" * 2000),
        ("log.json", b'{"user_id": 1, "item_id": 1, "timestamp": 1,' + b" " * 500 + b"}"),
        ("log.json.gz", gzip.compress(b"{" + bytes(2000))),
    ],
    ids=["a quote", "a word", "blanks", "packed"],  # the time is in what gzip writes, and may be in no name
)
def test_first_row_without_an_end(
    name: str, content: bytes, options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Not taken for a file without rows."""
    monkeypatch.setattr(text, "HEAD_BYTES", 100)
    (tmp_path / name).write_bytes(content)
    assert f"{name} has no row that ends within its first 100 bytes" in refusal(options(tmp_path / name), tmp_path)


def test_csv_as_excel_writes_it(options: Options, tmp_path: Path):
    (tmp_path / "log.csv").write_bytes(b'\xef\xbb\xbfuser_id;"item_id";timestamp\r\nu;"a;""b"";\r\nc";3\r\n')
    assert read(options(tmp_path / "log.csv", separator=";"), tmp_path).row(0) == ("u", 'a;"b";\r\nc', 3, 0)


# --- JSON lines ----------------------------------------------------------------------------------------------------


def jsonl(path: Path, *rows: Any) -> Path:
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return path


def row(user: Any = 1, item: Any = 1, time: Any = 1, **others: Any) -> dict[str, Any]:
    return {"user_id": user, "item_id": item, "timestamp": time, **others}


def test_json_keeps_numbers_and_strings_apart(options: Options, tmp_path: Path):
    path = jsonl(tmp_path / "log.jsonl", row(2**53 + 1, "7"), row(-5, "007", 2, nested={"a": [1]}), "\n", row(3, "é"))
    rows = read(options(path), tmp_path)
    assert rows["user_id"].to_list() == [2**53 + 1, -5, 3]
    assert rows["item_id"].to_list() == ["7", "007", "é"]


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([row(), {"item_id": 1, "timestamp": 1}], "column 'user_id' of log.jsonl has 1 nulls in rows 0 to 1"),
        ([row(), row(None)], "first None at row 1"),
        ([{"item_id": 1, "timestamp": 1}], "no column 'user_id' in log.jsonl: it has item_id, timestamp"),
        ([row({"id": 1})], "column 'user_id' of log.jsonl has type struct<id: int64>"),
        ([row(item=[1])], "column 'item_id' of log.jsonl has type"),
        ([row(1), row("x")], "column 'user_id' of log.jsonl has mixed types: "),
        ([row(1.5)], "column 'user_id' of log.jsonl has type double: 1 of its first 1 values"),
        ([row(2**64)], "column 'user_id' of log.jsonl holds integers beyond 64 bits: quote them"),
        (['[{"user_id": 1},\n'], "log.jsonl is a JSON array: write JSON lines"),
        ([row(), '{"user_id": 2'], "log.jsonl is no readable jsonl file"),
        ([row(), "nonsense\n"], "log.jsonl is no readable jsonl file"),
        ([row(time="noon")], "column 'timestamp' of log.jsonl has type string"),
    ],
)
def test_json_that_is_refused(rows: list, words: str, options: Options, tmp_path: Path):
    assert words in refusal(options(jsonl(tmp_path / "log.jsonl", *rows)), tmp_path)


def test_json_that_drifts_after_the_head(options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(text, "HEAD_BYTES", 200)
    path = jsonl(tmp_path / "log.jsonl", *[row()] * 50, row("x"))
    assert refusal(options(path), tmp_path) == (
        "column 'user_id' of log.jsonl has mixed types: number in some rows, string in others: write it with one type"
    )


def test_json_numbers_of_another_kind_after_the_head(options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(text, "HEAD_BYTES", 200)
    path = jsonl(tmp_path / "log.jsonl", *[row("u")] * 50, row("u", time=3.5))
    assert refusal(options(path), tmp_path) == (
        "column 'item_id' or 'timestamp' of log.jsonl has values of type int64 first, and 3.5 later: write it with one "
        "type"
    )


def test_json_events_that_begin_after_the_head(options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(text, "HEAD_BYTES", 200)
    path = jsonl(tmp_path / "log.jsonl", *[row(event=None)] * 50, row(event="buy"))
    events = read(options(path, event_column="event", event_weights={"buy": 1}), tmp_path)["event"]
    assert events.to_list() == [None] * 50 + ["buy"]


# --- events --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["parquet", "csv", "json"])
@pytest.mark.parametrize(("events", "expected"), [(["buy", None], ["buy", None]), ([3, 10], ["3", "10"])])
def test_events_are_text(events: list, expected: list, ending: str, options: Options, tmp_path: Path):
    write(
        pl.DataFrame({"user_id": [1, 2], "item_id": [1, 2], "timestamp": [1, 2], "what": events}),
        tmp_path / f"log.{ending}",
    )
    rows = read(options(tmp_path / f"log.{ending}", event_column="what", event_weights={"buy": 1}), tmp_path)
    assert rows.columns == ["user_id", "item_id", "timestamp", "position", "event"]
    assert rows["event"].dtype == pl.String
    assert rows["event"].to_list() == expected


def test_events_are_no_floats(log: Log, options: Options, tmp_path: Path):
    path = log(user_id=[1], item_id=[1], timestamp=[1], what=[1.5])
    message = refusal(options(path, event_column="what", event_weights={"buy": 1}), tmp_path)
    assert "column 'what' of log.parquet has type double: events must be strings or integers" in message


# --- units of time -------------------------------------------------------------------------------------------------

SECOND = 1_700_000_000
FACTORS = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}


@pytest.mark.parametrize("ending", ["parquet", "csv", "json"])
@pytest.mark.parametrize("unit", FACTORS)
def test_units_are_told_by_magnitude(unit: str, ending: str, log: Log, options: Options, tmp_path: Path):
    for second in (10**8, SECOND, 4_102_444_799):  # 1973 to 2099
        times = [second * FACTORS[unit], second * FACTORS[unit]]
        write(pl.DataFrame({"user_id": [1, 2], "item_id": [1, 2], "timestamp": times}), tmp_path / f"log.{ending}")
        config = options(tmp_path / f"log.{ending}")
        assert planned(config, tmp_path).time_unit == unit
        assert read(config, tmp_path)["timestamp"].to_list() == times


@pytest.mark.parametrize(
    ("times", "unit"),
    [
        ([0, 1], "none"),
        ([-5, 99_999_999], "none"),
        ([0, SECOND], "s"),  # 0: no time known, or a place; not another unit
        ([datetime.date(2024, 1, 1)] * 2, "day"),
        ([datetime.datetime(2024, 1, 1)] * 2, "us"),
    ],
)
def test_units_of_other_times(times: list, unit: str, log: Log, options: Options, tmp_path: Path):
    path = log(user_id=[1, 2], item_id=[1, 2], timestamp=times)
    assert planned(options(path), tmp_path).time_unit == unit
    assert read(options(path), tmp_path).height == 2


def test_no_time_column_has_no_unit(log: Log, options: Options, tmp_path: Path):
    assert planned(options(log(user_id=[1], item_id=[1]), time_column=None), tmp_path).time_unit == "row"


@pytest.mark.parametrize("ending", ["parquet", "csv", "json"])
def test_units_mixed_between_files(ending: str, log: Log, options: Options, tmp_path: Path):
    for name, factor in (("a", 1), ("b", 1), ("c", 1000)):
        frame = pl.DataFrame({"user_id": [1, 2], "item_id": [1, 2], "timestamp": [0, SECOND * factor]})
        write(frame, tmp_path / "log" / f"{name}.{ending}")
    message = refusal(options(tmp_path / "log"), tmp_path)
    assert message.startswith(f"column 'timestamp' has times in ms in c.{ending} ({SECOND}000 ")
    assert f"but in s in a.{ending} ({SECOND} " in message
    assert "set time_unit" in message
    assert read(options(tmp_path / "log", time_unit="s"), tmp_path)["timestamp"][-1] == SECOND * 1000


def test_units_mixed_where_neither_statistics_nor_the_head_show_it(
    log: Log, options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """In the middle of a row group: least and greatest are zero and milliseconds."""
    times = [0, SECOND, SECOND * 1000]
    path = log(user_id=[1, 2, 3], item_id=[1, 2, 3], timestamp=times)
    assert f"has times in s in log.parquet ({SECOND} at row 1), but in ms in" in refusal(options(path), tmp_path)
    monkeypatch.setattr(text, "HEAD_BYTES", 100)
    path = log("log.csv", user_id=1, item_id=1, timestamp=[SECOND] * 500 + [SECOND * 1000])
    assert f"has times in ms in log.csv ({SECOND}000 at row 500), but in s in" in refusal(options(path), tmp_path)


def test_units_without_statistics(options: Options, tmp_path: Path):
    times = pa.table({"user_id": [1, 2], "item_id": [1, 2], "timestamp": [5, SECOND * 1000]})
    pq.write_table(times, tmp_path / "log.parquet", write_statistics=False)
    assert planned(options(tmp_path / "log.parquet"), tmp_path).time_unit == "ms"


def test_datetimes_of_different_units_are_read_in_the_finest(options: Options, tmp_path: Path):
    moment = datetime.datetime(2024, 1, 1, 12, tzinfo=datetime.UTC)
    for unit in ("ms", "ns", "us"):
        table(tmp_path / "log" / f"{unit}.parquet", timestamp=pa.array([moment], pa.timestamp(unit, "UTC")))
    table(tmp_path / "log" / "plain.parquet", timestamp=pa.array([moment.replace(tzinfo=None)], pa.timestamp("us")))
    config = options(tmp_path / "log")
    assert planned(config, tmp_path).time_unit == "ns"
    assert read(config, tmp_path)["timestamp"].to_list() == [int(moment.timestamp()) * 10**9] * 4


def test_datetimes_that_the_finest_unit_cannot_hold(options: Options, tmp_path: Path):
    far = datetime.datetime(9999, 12, 31)
    table(tmp_path / "log" / "a.parquet", timestamp=pa.array([far], pa.timestamp("ms")))
    table(tmp_path / "log" / "b.parquet", timestamp=pa.array([0], pa.timestamp("ns")))
    assert "1 times too far off for ns" in refusal(options(tmp_path / "log"), tmp_path)


@pytest.mark.parametrize("ending", ["csv", "json"])
@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (["1970-01-02", "1970-01-01 00:00:01"], [86_400_000_000, 1_000_000]),
        (["1970-01-01T00:00:01Z", "1970-01-01T02:00:01.5+02:00"], [1_000_000, 1_500_000]),
    ],
)
def test_iso_times_in_text(written: list, expected: list, ending: str, options: Options, tmp_path: Path):
    write(pl.DataFrame({"user_id": [1, 2], "item_id": [1, 2], "timestamp": written}), tmp_path / f"log.{ending}")
    assert read(options(tmp_path / f"log.{ending}"), tmp_path)["timestamp"].to_list() == expected


@pytest.mark.parametrize("written", ["01/02/2024", "1-2-2024", "01.02.2024 10:00", "02/01/24"])
def test_dates_with_the_day_or_the_month_first_are_no_iso_times(written: str, options: Options, tmp_path: Path):
    (tmp_path / "log.csv").write_text(f"user_id,item_id,timestamp\n1,2,{written}\n")
    assert "column 'timestamp' of log.csv has type string" in refusal(options(tmp_path / "log.csv"), tmp_path)


# --- the time range ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "unit", "expected"),
    [
        (5, "s", 5),
        ("-5", "none", -5),
        ("1970-01-02", "s", 86_400),
        ("1970-01-02", "day", 1),
        ("1970-01-02T00:00:00.5", "s", 86_401),  # t >= it exactly where t is not before it
        ("1970-01-02T00:00:01", "day", 2),
        ("1970-01-01T01:00:00+01:00", "ns", 0),
        ("1969-12-31T23:59:59.999999Z", "us", -1),
        ("2024-02-29", "ms", 1_709_164_800_000),
    ],
)
def test_bounds_in_the_unit_of_the_column(value: int | str, unit: str, expected: int):
    assert in_unit(value, unit, "time_from") == expected


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"time_from": "yesterday"}, "time_from='yesterday' is no date: write it like 2024-01-31"),
        ({"time_from": 10, "time_to": 10}, "time_from=10, time_to=10 is an empty range"),
        ({"time_from": 11, "time_to": "10"}, "is an empty range"),
        (
            {"time_to": "2024-01-01"},
            "time_to='2024-01-01' is a date, but the times of the source are numbers",
        ),
        ({"time_from": 1000}, "has no rows in time_from=1000: widen the range"),
    ],
)
def test_ranges_that_are_refused(changes: dict, words: str, log: Log, options: Options, tmp_path: Path):
    path = log(user_id=[1, 2], item_id=[1, 2], timestamp=[1, 2])
    assert words in refusal(options(path, **changes), tmp_path)


@settings(max_examples=100, deadline=None)
@given(
    times=st.lists(st.integers(0, 30), min_size=1, max_size=40),
    row_group_size=st.integers(1, 9),
    bounds=st.tuples(st.none() | st.integers(-2, 32), st.none() | st.integers(-2, 32)),
    kind=st.sampled_from(["int", "float", "date", "ms"]),
)
def test_pruning_loses_no_row_of_the_range_and_counts_the_others(
    times: list[int], row_group_size: int, bounds: tuple, kind: str
):
    time_from, time_to = bounds
    if time_from is not None and time_to is not None and time_from >= time_to:
        time_to = None
    column = pl.Series(times)
    column = {
        "int": column,
        "float": column.cast(pl.Float64),
        "date": column.cast(pl.Int32).cast(pl.Date),
        "ms": column.cast(pl.Datetime("ms")),
    }[kind]
    with tempfile.TemporaryDirectory() as directory:
        frame = pl.DataFrame({"user_id": range(len(times)), "item_id": 1, "timestamp": column})
        frame.write_parquet(f"{directory}/log.parquet", row_group_size=row_group_size)
        config = PrepareConfig(source=directory, out="unused", time_from=time_from, time_to=time_to, rows_per_block=5)
        inside = [
            time for time in times if (time_from is None or time >= time_from) and (time_to is None or time < time_to)
        ]
        groups = [times[row : row + row_group_size] for row in range(0, len(times), row_group_size)]
        kept = [
            group
            for group in groups
            if (time_from is None or max(group) >= time_from) and (time_to is None or min(group) < time_to)
        ]
        if not kept:
            assert "has no rows in time_" in refusal(config, Path(directory))
            return
        source = plan(resolve(config, Path(directory)), config)
        rows = pl.concat(frame for chunk in source.chunks for frame in read_chunk(source, chunk, config))
    assert (source.time_from, source.time_to) == (time_from, time_to)
    assert rows["timestamp"].to_list() == [time for group in kept for time in group]
    assert source.rows == rows.height
    assert source.pruned_rows == len(times) - rows.height
    assert rows["position"].to_list() == rows["user_id"].to_list()  # positions do not move when groups are left out
    lower, upper = (bounds[0] if bounds[0] is not None else -9), (time_to if time_to is not None else 99)
    assert rows.filter(pl.col("timestamp").is_between(lower, upper, closed="left"))["timestamp"].to_list() == inside


def test_row_groups_outside_the_range_are_left_out(options: Options, tmp_path: Path):
    start = datetime.datetime(2024, 1, 1)
    days = [start + datetime.timedelta(days=day) for day in range(10)]
    frame = pl.DataFrame({"user_id": range(10), "item_id": 1, "timestamp": days})
    frame.write_parquet(tmp_path / "log.parquet", row_group_size=2)
    config = options(tmp_path / "log.parquet", time_from="2024-01-04", time_to="2024-01-05T12:00:00")
    source = planned(config, tmp_path)
    assert (source.rows, source.pruned_rows) == (4, 6)
    assert read(config, tmp_path)["user_id"].to_list() == [2, 3, 4, 5]


def test_times_of_old_spark_have_no_statistics(options: Options, tmp_path: Path):
    times = pa.array([datetime.datetime(2024, 1, day) for day in (1, 2, 3)], pa.timestamp("us"))
    columns = pa.table({"user_id": [1, 2, 3], "item_id": [1, 2, 3], "timestamp": times})
    pq.write_table(columns, tmp_path / "log.parquet", use_deprecated_int96_timestamps=True, row_group_size=1)
    source = planned(options(tmp_path / "log.parquet", time_from="2024-01-02"), tmp_path)
    assert (source.time_unit, source.rows, source.pruned_rows) == ("ns", 3, 0)


# --- hive partitions -----------------------------------------------------------------------------------------------


@pytest.fixture
def days(tmp_path: Path) -> Path:
    """Four days of two rows, by partition; users in the partition above."""
    for number, day in enumerate(("2024-01-01", "2024-01-02", "2024-01-03", "2024-01-04")):
        directory = tmp_path / "log" / f"user=u%2F{number % 2}" / f"date={day}"
        directory.mkdir(parents=True)
        pl.DataFrame({"item_id": [number, 10 + number]}).write_parquet(directory / "part.parquet")
    return tmp_path / "log"


def test_partitions_are_columns(days: Path, options: Options, tmp_path: Path):
    rows = read(options(days, user_column="user", time_column="date"), tmp_path)
    assert rows["user_id"].to_list() == ["u/0"] * 4 + ["u/1"] * 4
    assert rows["item_id"].to_list() == [0, 10, 2, 12, 1, 11, 3, 13]
    first = 1_704_067_200_000_000
    assert rows["timestamp"].to_list() == [first + day * 86_400_000_000 for day in (0, 0, 2, 2, 1, 1, 3, 3)]


def test_partitions_outside_the_range_are_not_opened(days: Path, options: Options, tmp_path: Path):
    config = options(days, user_column="user", time_column="date", time_from="2024-01-02", time_to="2024-01-04")
    for name in ("user=u%2F0/date=2024-01-01", "user=u%2F1/date=2024-01-04"):
        (days / name / "part.parquet").write_text("no parquet at all")
    source = planned(config, tmp_path)
    assert (source.pruned_files, source.pruned_rows, source.rows) == (2, 0, 4)
    rows = read(config, tmp_path)
    assert rows["item_id"].to_list() == [2, 12, 1, 11]
    assert rows["position"].to_list() == [2**40, 2**40 + 1, 2 * 2**40, 2 * 2**40 + 1]  # as without a range


def test_columns_of_a_file_go_before_its_path(options: Options, tmp_path: Path):
    """The path tells the day, the file the moment; the day of the bound is opened, for it holds moments after it."""
    for day in (1, 2, 3):
        moments = [datetime.datetime(2024, 1, day, hour) for hour in (1, 23)]
        path = tmp_path / "log" / f"date=2024-01-0{day}" / "x.parquet"
        table(path, date=pa.array(moments, pa.timestamp("us")))
    config = options(tmp_path / "log", time_column="date", time_from="2024-01-02T12:00:00")
    source = planned(config, tmp_path)
    assert (source.pruned_files, source.rows) == (1, 4)
    assert read(config, tmp_path)["timestamp"].is_in([1_704_236_400_000_000]).sum() == 1  # 2024-01-02T23:00


@pytest.mark.parametrize(("values", "kind"), [(["1", "2"], "int64"), (["1", "x"], "string"), (["01", "02"], "string")])
def test_types_of_partitions_come_from_all_their_values(values: list, kind: str, options: Options, tmp_path: Path):
    for value in values:
        table(tmp_path / "log" / f"shop={value}" / "x.parquet", item_id=pa.array([1]))
    config = options(tmp_path / "log", user_column="shop")
    assert planned(config, tmp_path).kinds.user == kind
    assert read(config, tmp_path)["user_id"].to_list() == ([1, 2] if kind == "int64" else values)


def test_partition_that_is_no_time_beside_a_column_that_is(options: Options, tmp_path: Path):
    table(tmp_path / "log" / "timestamp=old" / "x.parquet", timestamp=pa.array([5, 6]))
    config = options(tmp_path / "log", time_from=6)
    assert read(config, tmp_path)["timestamp"].to_list() == [5, 6]


def test_partitions_of_seconds(options: Options, tmp_path: Path):
    for day in range(4):
        table(tmp_path / "log" / f"t={SECOND + day * 86_400}" / "x.parquet", item_id=pa.array([day]))
    config = options(tmp_path / "log", time_column="t", time_from=SECOND + 2 * 86_400)
    source = planned(config, tmp_path)
    assert (source.time_unit, source.pruned_files) == ("s", 2)


def test_null_partition(options: Options, tmp_path: Path):
    for value in ("1", "__HIVE_DEFAULT_PARTITION__"):
        table(tmp_path / "log" / f"shop={value}" / "x.parquet", item_id=pa.array([1]))
    assert refusal(options(tmp_path / "log", user_column="shop"), tmp_path) == (
        "column 'shop' of shop=__HIVE_DEFAULT_PARTITION__/x.parquet is null, its path says: take the file out of the "
        "source"
    )
    config = options(tmp_path / "log", event_column="shop", event_weights={"1": 1})
    assert read(config, tmp_path)["event"].to_list() == ["1", None]


def test_partitions_of_text_files(options: Options, tmp_path: Path):
    for name, content in (("a.csv", "user_id,item_id\n1,2\n"), ("b.json", '{"user_id": 3, "item_id": 4}\n')):
        (tmp_path / "log" / f"day={name[0]}").mkdir(parents=True)
        (tmp_path / "log" / f"day={name[0]}" / name).write_text(content)
    config = options(tmp_path / "log", time_column=None, event_column="day", event_weights={"a": 1})
    assert read(config, tmp_path).select("user_id", "item_id", "event").rows() == [(1, 2, "a"), (3, 4, "b")]


def test_nothing_but_partitions(options: Options, tmp_path: Path):
    table(tmp_path / "user=1" / "item=2" / "x.parquet", rating=pa.array([1]))
    config = options(tmp_path / "user=1", user_column="user", item_column="item", time_column=None)
    assert "holds none of the columns user, item" in refusal(config, tmp_path)
