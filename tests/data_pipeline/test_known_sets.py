"""MovieLens-100K from either origin, and the synthetic log. Nothing here touches a network."""

import http.client
import io
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from data_pipeline import known, synthetic
from data_pipeline.errors import GenattError

ROWS = b"196\t242\t3\t881250949\n186\t302\t3\t891717742\n"
FLAGS = "|".join("1" if genre in ("Comedy", "Drama") else "0" for genre in known.GENRES)
ZIP = {
    "ml-100k/u.data": ROWS,
    "ml-100k/u.item": f"242|Kolya (1996)|24-Jan-1997||http://x|{FLAGS}\n".encode("latin-1"),
}
WHEEL = {
    "recbole/dataset_example/ml-100k/ml-100k.inter": b"user_id:token\titem_id:token\trating:float\tt:float\n" + ROWS,
    "recbole/dataset_example/ml-100k/ml-100k.item": b"i:token\tt:x\ty:x\tc:x\n242\tKolya\t1996\tComedy Drama\n",
}


def archive(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, content in members.items():
            file.writestr(name, content)
    return buffer.getvalue()


def unreachable(_: Path) -> None:
    raise OSError("no route to host")


@pytest.fixture
def origins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[known.Origin, ...]]:
    """Both origins, with small archives in place of what they fetch, or the failures given."""
    monkeypatch.setenv("GENATT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(known, "ROWS_SHA256", known._sha256(ROWS))

    def make(*failures: Callable[[Path], None] | None) -> tuple[known.Origin, ...]:
        made = []
        for origin, members, failure in zip(known.ORIGINS, (ZIP, WHEEL), failures, strict=True):
            content = archive(members)
            fetch = failure or (lambda target, content=content: target.write_bytes(content) and None)
            made.append(replace(origin, sha256=known._sha256(content), fetch=fetch))
        return tuple(made)

    return make


@pytest.mark.parametrize("failures", [(None, unreachable), (unreachable, None)])
def test_both_origins_give_the_same_tables(failures: tuple, origins: Callable, tmp_path: Path):
    known.write_ml_100k(tmp_path, origins(*failures))
    assert pl.read_parquet(tmp_path / "interactions.parquet").rows() == [
        (196, 242, 3, 881250949),
        (186, 302, 3, 891717742),
    ]
    assert pl.read_parquet(tmp_path / "items.parquet").rows() == [(242, "Kolya (1996)", ["Comedy", "Drama"])]


def test_cached_archive_needs_no_network(origins: Callable, tmp_path: Path):
    known.write_ml_100k(tmp_path, origins(unreachable, None))
    known.write_ml_100k(tmp_path, origins(unreachable, unreachable))


def test_damaged_cache_is_fetched_again(origins: Callable, tmp_path: Path):
    known.write_ml_100k(tmp_path, origins(None, unreachable))
    (tmp_path / "cache/ml-100k/ml-100k.zip").write_bytes(b"damaged")
    known.write_ml_100k(tmp_path, origins(None, unreachable))


def test_nothing_to_be_had(origins: Callable, tmp_path: Path):
    def interrupted(_: Path) -> None:
        raise http.client.IncompleteRead(b"")

    with pytest.raises(
        GenattError, match=r"grouplens.*IncompleteRead.*recbole 1\.2\.1.*no route.*--data PATH.*synthetic"
    ):
        known.write_ml_100k(tmp_path, origins(interrupted, unreachable))
    assert list((tmp_path / "cache/ml-100k").iterdir()) == []


def test_archive_with_another_content_is_refused(origins: Callable, tmp_path: Path):
    def replaced(target: Path) -> None:
        target.write_bytes(b"<html>log in to this network</html>")

    with pytest.raises(GenattError, match="expected"):
        known.write_ml_100k(tmp_path, origins(replaced, unreachable))


def test_pip_that_fails_or_hangs_is_an_os_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(known.sys, "executable", "/bin/false")
    with pytest.raises(OSError, match="pip failed"):
        known.fetch_wheel("recbole==1.2.1", tmp_path / "x.whl")
    slow = tmp_path / "slow"
    slow.write_text("#!/bin/sh\nexec sleep 20\n")
    slow.chmod(0o755)
    monkeypatch.setattr(known.sys, "executable", str(slow))
    monkeypatch.setattr(known, "DOWNLOAD_SECONDS", 0.2)
    with pytest.raises(TimeoutError, match="pip was not done"):
        known.fetch_wheel("recbole==1.2.1", tmp_path / "x.whl")


def test_pinned_rows_are_the_shared_ones(shared_data: Path):
    """The hash pins the file order; sorting it stably by user and time gives the shared table, row by row."""
    cached = [known.cache_directory() / "ml-100k" / origin.filename for origin in known.ORIGINS]
    found = [(path, origin) for path, origin in zip(cached, known.ORIGINS, strict=True) if path.is_file()]
    if not found:
        pytest.skip("ml-100k is not in the cache; `genatt prepare ml-100k` puts it there")
    path, origin = found[0]
    with zipfile.ZipFile(path) as file:
        rows = origin.rows(file)
    assert known._sha256(rows) == known.ROWS_SHA256
    table = pl.read_csv(rows, separator="\t", has_header=False, new_columns=known.ROW_COLUMNS)
    shared = pl.read_parquet(shared_data / "ml-100k" / "interactions.parquet").select(known.ROW_COLUMNS).cast(pl.Int64)
    assert table.sort("user_id", "timestamp", maintain_order=True).equals(shared)


def test_synthetic_is_deterministic_and_as_large_as_asked():
    options = synthetic.Options.parse("users=200,items=50,rows=4000,seed=3")
    log, items = synthetic.generate(options)
    assert synthetic.generate(options)[0].equals(log)
    assert not synthetic.generate(synthetic.Options.parse("users=200,items=50,rows=4000,seed=4"))[0].equals(log)
    assert (log.height, log["user_id"].n_unique(), items.height) == (4000, 200, 50)
    assert log["item_id"].is_between(1, 50).all()
    assert log["timestamp"].is_sorted()
    assert log.group_by("user_id").len()["len"].min() >= synthetic.MIN_LENGTH


@pytest.mark.parametrize("follow", [0.0, 0.6])
def test_synthetic_successor_is_planted(follow: float):
    log, _ = synthetic.generate(synthetic.Options(users=500, items=100, rows=40_000, follow=follow))
    pairs = log.sort("user_id", "timestamp", maintain_order=True).with_columns(
        following=pl.col("item_id").shift(-1).over("user_id")
    )
    counts = pairs.drop_nulls().group_by("item_id", "following").len()
    best = counts.group_by("item_id").agg(pl.col("len").max().alias("best"), pl.col("len").sum().alias("all"))
    hit_rate = best["best"].sum() / best["all"].sum()
    most_popular = log.group_by("item_id").len()["len"].max() / log.height
    if follow:
        assert hit_rate > follow > 3 * most_popular
    else:
        assert hit_rate == pytest.approx(most_popular, abs=0.03)


def test_synthetic_popularity_is_zipf():
    log, _ = synthetic.generate(synthetic.Options(users=100, items=100, rows=100_000, follow=0))
    counts = np.sort(log.group_by("item_id").len()["len"].to_numpy())[::-1]
    assert counts[0] / counts[9] == pytest.approx(10, rel=0.15)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("user=5", "did you mean 'users'"),
        ("users=x", "users=x"),
        ("users=100,rows=10", "rows=10 is too few for users=100"),
    ],
)
def test_synthetic_refuses(text: str, words: str):
    with pytest.raises(GenattError, match=words):
        synthetic.Options.parse(text)
