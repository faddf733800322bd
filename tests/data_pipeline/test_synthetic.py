"""The synthetic log: exact sizes, the laws it promises, and the same bytes however it is cut into pieces."""

import hashlib
import subprocess
import sys
from pathlib import Path

import fsspec
import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipeline import synthetic
from data_pipeline.errors import GenattError
from data_pipeline.synthetic import Options

LAWS = ("lognormal", "geometric", "zipf", "fixed")


def log_of(text: str) -> pl.DataFrame:
    frame = pl.from_arrow(pa.concat_tables(synthetic.tables(Options.parse(text))))
    assert isinstance(frame, pl.DataFrame)
    return frame


def test_default_size():
    log = log_of("")
    items = pa.concat_tables(synthetic.item_tables(Options()))
    assert (log.height, log["user_id"].n_unique(), items.num_rows) == (20_000, 1000, 500)
    assert items.slice(498).to_pylist() == [
        {"item_id": 499, "title": "item 499", "genres": ["genre 20"]},
        {"item_id": 500, "title": "item 500", "genres": ["genre 20"]},
    ]


def test_seed_decides():
    one = log_of("users=200,items=50,rows=4000,seed=3")
    assert one.equals(log_of("users=200,items=50,rows=4000,seed=3"))
    other = log_of("users=200,items=50,rows=4000,seed=4")
    for column in one.columns:
        assert not one[column].equals(other[column])


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize(("users", "rows", "least"), [(1, 1, 1), (1, 5, 5), (300, 1500, 5), (300, 7001, 20), (7, 9, 1)])
def test_totals_are_exact(law: str, users: int, rows: int, least: int):
    log = log_of(f"users={users},items=50,rows={rows},lengths={law},min_length={least},files={min(rows, 3)}")
    assert log.height == rows
    assert log["user_id"].unique().sort().to_list() == list(range(1, users + 1))
    assert log["item_id"].is_between(1, 50).all()
    assert log.group_by("user_id").len()["len"].min() >= least


@pytest.mark.parametrize("law", LAWS)
def test_totals_survive_rounding(law: str):
    for seed in range(200):
        options = Options.parse(f"users=37,rows={200 + 7 * seed},seed={seed},lengths={law}")
        lengths = synthetic._Users.draw(options).length
        assert (lengths.sum(), lengths.min() >= 5) == (options.rows, True)


def test_fixed_lengths_differ_by_one_at_most():
    lengths = log_of("users=300,rows=7001,lengths=fixed").group_by("user_id").len()["len"]
    assert sorted(lengths.unique()) == [23, 24]


def test_laws_of_lengths():
    """Means are equal; the tails are not: the longest history tells them apart."""
    longest = {}
    for law in LAWS:
        lengths = log_of(f"users=20000,items=50,rows=500000,lengths={law}").group_by("user_id").len()["len"]
        assert lengths.mean() == 25
        longest[law] = lengths.max()
    assert longest["fixed"] == 25 < 150 < longest["geometric"] < 300 < longest["zipf"]
    geometric = (
        log_of("users=20000,items=50,rows=500000,lengths=geometric,min_length=1").group_by("user_id").len()["len"]
    )
    assert (geometric > 25).mean() == pytest.approx(np.exp(-1), abs=0.01)


def test_time_rises_and_every_user_keeps_to_a_window():
    log = log_of("users=500,items=50,rows=50000")
    assert log["timestamp"].is_sorted()
    assert log["timestamp"].is_between(synthetic.START, synthetic.START + synthetic.YEAR - 1).all()
    spans = log.group_by("user_id").agg(span=pl.col("timestamp").max() - pl.col("timestamp").min())["span"]
    assert spans.quantile(0.1) < synthetic.YEAR * 0.05 < synthetic.YEAR * 0.7 < spans.quantile(0.95)


@pytest.mark.parametrize(
    "text",
    [
        "users=900,items=70,rows=20000",
        "users=900,items=70,rows=20000,files=5,events=view:9+buy:1,lengths=zipf,follow=0.95",
        "users=40,items=2,rows=20000,follow=1,zipf=0,lengths=fixed",
    ],
)
def test_same_rows_in_whatever_pieces(text: str, monkeypatch: pytest.MonkeyPatch):
    whole = log_of(text)
    monkeypatch.setattr(synthetic, "SLICE_ROWS", (1000, 1000))
    monkeypatch.setattr(synthetic, "USER_BLOCK", 170)
    assert len(list(synthetic.tables(Options.parse(text)))) >= 20
    assert log_of(text).equals(whole)


def test_first_item_of_a_user_is_a_fresh_draw():
    log = log_of("users=5000,items=100,rows=25000,follow=1")
    first = log.group_by("user_id", maintain_order=True).first()["item_id"]
    expected = 1 / (1 / np.arange(1, 101)).sum()
    assert (first == 1).mean() == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize("follow", [0.0, 0.6, 1.0])
def test_successor_is_planted(follow: float):
    items = 100
    log = log_of(f"users=500,items={items},rows=40000,follow={follow}").sort("user_id", maintain_order=True)
    following = pl.col("item_id").shift(-1).over("user_id")
    pairs = log.select("item_id", following=following).drop_nulls()
    share = pairs.select((pl.col("following") == pl.col("item_id") % items + 1).mean()).item()
    popularity = np.bincount(log["item_id"].to_numpy() - 1, minlength=items) / log.height
    by_chance = (popularity * np.roll(popularity, -1)).sum()
    assert share == pytest.approx(follow + (1 - follow) * by_chance, abs=0.01)


@pytest.mark.parametrize("exponent", [0.0, 0.7, 1.0, 1.4])
@pytest.mark.parametrize("items", [100, 5000])
def test_popularity_is_zipf(exponent: float, items: int):
    """Also beyond the ranks that are drawn from exact sums."""
    log = log_of(f"users=100,items={items},rows=1000000,follow=0,zipf={exponent}")
    expected = np.arange(1, items + 1) ** -exponent
    expected *= log.height / expected.sum()
    popularity = synthetic._Popularity(items, exponent)
    ranked = np.arange(items) * popularity.step % items
    counts = np.bincount(log["item_id"].to_numpy() - 1, minlength=items)[ranked]
    chi_squared = ((counts - expected) ** 2 / expected).sum()
    assert abs(chi_squared - items) < 5 * np.sqrt(2 * items)


@pytest.mark.parametrize("exponent", [0.0, 0.7, 1.0, 1.4])
def test_every_rank_has_its_share_of_the_unit_interval(exponent: float):
    items, points = 3000, 1_000_000
    popularity = synthetic._Popularity(items, exponent)
    drawn = np.bincount(popularity.draw((np.arange(points) + 0.5) / points), minlength=items)
    expected = np.arange(1, items + 1) ** -exponent
    expected *= points / expected.sum()
    assert np.abs(drawn[np.arange(items) * popularity.step % items] - expected).max() < 1.01


@pytest.mark.parametrize("items", [2, 3, 10, 999, 1024, 1025, 2**20, 1_000_000])
def test_ranks_are_a_permutation_of_the_ring(items: int):
    popularity = synthetic._Popularity(items, 1.0)
    ranked = np.arange(items) * popularity.step % items
    assert np.array_equal(np.sort(ranked), np.arange(items))
    ends = popularity.draw(np.array([0.0, 1 - 2.0**-53]))
    assert ends.tolist() == [0, (items - 1) * popularity.step % items]


def test_events_have_their_shares():
    log = log_of("users=500,items=100,rows=100000,events=view:90+cart:7+buy:3")
    assert log.schema["event"] == pl.String
    counts = dict(log["event"].value_counts().rows())
    assert [round(counts[name] / log.height, 2) for name in ("view", "cart", "buy")] == [0.9, 0.07, 0.03]
    assert log.drop("event").equals(log_of("users=500,items=100,rows=100000"))


def test_files_are_consecutive_in_time_and_hold_many_users(tmp_path: Path):
    options = Options.parse("users=500,items=30,rows=20000,files=4,lengths=fixed")
    synthetic.write(options, tmp_path)
    names = [f"interactions.0000{file}-of-00004.parquet" for file in range(4)]
    assert sorted(path.name for path in tmp_path.iterdir()) == [*names, "items.parquet"]
    files = [pl.read_parquet(tmp_path / name) for name in names]
    assert pl.concat(files).equals(log_of("users=500,items=30,rows=20000,lengths=fixed"))
    for file in files:
        assert file.height == pytest.approx(5000, rel=0.03)
        assert file["user_id"].n_unique() > 200
        assert (file["user_id"].diff() != 0).mean() > 0.8  # neighbouring rows are of different users


def test_one_file_has_the_plain_name_and_bounded_row_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(synthetic, "ROW_GROUP", 8192)
    synthetic.write(Options(), tmp_path)
    metadata = pq.read_metadata(tmp_path / "interactions.parquet")
    assert [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)] == [8192, 8192, 3616]
    assert pl.read_parquet(tmp_path / "items.parquet").height == 500


def test_same_bytes_here_and_there(tmp_path: Path):
    options = Options.parse("users=100,items=30,rows=3000,files=2")
    synthetic.write(options, tmp_path / "new")
    synthetic.write_to(options, "memory://synthetic/log")
    remote = fsspec.filesystem("memory")
    for path in (tmp_path / "new").iterdir():
        assert remote.cat_file(f"/synthetic/log/{path.name}") == path.read_bytes()


def test_same_bytes_in_another_process(tmp_path: Path):
    """With one thread where this process has several."""
    code = (
        "import sys, pathlib, pyarrow; pyarrow.set_cpu_count(1); from data_pipeline import synthetic;"
        "synthetic.write(synthetic.Options.parse(sys.argv[1]), pathlib.Path(sys.argv[2]))"
    )
    text = "users=100,items=30,rows=3000,lengths=geometric"
    subprocess.run([sys.executable, "-c", code, text, tmp_path / "a"], check=True, timeout=60)
    synthetic.write(Options.parse(text), tmp_path / "b")
    for name in ("interactions.parquet", "items.parquet"):
        digests = {hashlib.sha256((tmp_path / side / name).read_bytes()).hexdigest() for side in "ab"}
        assert len(digests) == 1


def test_directory_that_cannot_be_written(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(GenattError, match=r"cannot write .*/file/log: .*Not a directory"):
        synthetic.write(Options(), tmp_path / "file" / "log")


@pytest.mark.slow
def test_memory_does_not_grow_with_the_rows():
    code = (
        "import resource, sys; from data_pipeline import synthetic;"
        "rows = sum(table.num_rows for table in synthetic.tables(synthetic.Options.parse(sys.argv[1])));"
        "print(rows, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    peaks = []
    for rows in (2_000_000, 16_000_000):
        command = [sys.executable, "-c", code, f"users=100000,items=1000000,rows={rows}"]
        made, peak = subprocess.run(command, check=True, capture_output=True, timeout=120).stdout.split()
        assert int(made) == rows
        peaks.append(int(peak))
    assert peaks[1] < 1.2 * peaks[0]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("user=5", "did you mean 'users'"),
        ("users=x", "users=x"),
        ("users=100,rows=10", "rows=10 is too few for users=100: give 5 a user"),
        ("users=100,rows=900,min_length=10", "rows=900 is too few for users=100: give 10 a user"),
        ("follow=1.5", "follow=1.5"),
        ("zipf=nan", "zipf=nan"),
        ("lengths=normal", "lengths=normal"),
        ("files=0", "files=0"),
        ("users=1,rows=9,files=10", "files=10 is too many for rows=9"),
        ("events=view:9+buy", "'buy' is not NAME:WEIGHT"),
        ("events=view:0", "'view:0' is not NAME:WEIGHT"),
        ("events=", "'' is not NAME:WEIGHT"),
        ("events=view:1+view:2", "view is there twice"),
    ],
)
def test_refused_options(text: str, words: str):
    with pytest.raises(GenattError, match=words) as caught:
        Options.parse(text)
    assert str(caught.value).startswith("synthetic: ")
    assert "\n" not in str(caught.value)
