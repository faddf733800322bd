"""Public data sets: downloads from a server of these tests, and archives made here in each set's layout."""

import fcntl
import gzip
import hashlib
import http.server
import io
import threading
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import polars as pl
import pytest
import requests
from rich.console import Console

from data_pipeline import known
from data_pipeline.errors import GenattError
from data_pipeline.known import cache, download, movielens, sets
from data_pipeline.known.cache import File
from data_pipeline.known.download import UnavailableError
from data_pipeline.known.sets import SETS

QUIET = Console(stderr=True, quiet=True)
CONTENT = bytes(range(256)) * 4096  # 1 MiB


@dataclass
class Server:
    """Serves `files`; counts and remembers requests."""

    port: int
    files: dict[str, bytes] = field(default_factory=lambda: {"/file": CONTENT})
    ranges: bool = True
    etag: str | None = '"1"'
    cuts: list[int] = field(default_factory=list)  # after how many bytes the next answers break off
    stalls: bool = False
    statuses: list[int] = field(default_factory=list)  # of the next answers, instead of a content
    asked: list[tuple[str, str | None]] = field(default_factory=list)  # path, Range
    stop: threading.Event = field(default_factory=threading.Event)

    def address(self, path: str = "/file") -> str:
        return f"http://127.0.0.1:{self.port}{path}"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(download, "WAITS", (0.01, 0.01))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            wanted = self.headers.get("Range")
            state.asked.append((self.path, wanted))
            status = state.statuses.pop(0) if state.statuses else 200 if self.path in state.files else 404
            if status != 200:
                self.send_error(status)
                return
            content = state.files[self.path]
            same = state.etag is not None and self.headers.get("If-Range") == state.etag
            begin = int(wanted[6:-1]) if wanted and state.ranges and same else 0
            if begin >= len(content):
                self.send_error(416)
                return
            self.send_response(206 if begin else 200)
            if begin:
                self.send_header("Content-Range", f"bytes {begin}-{len(content) - 1}/{len(content)}")
            self.send_header("Content-Length", str(len(content) - begin))
            if state.etag:
                self.send_header("ETag", state.etag)
            self.end_headers()
            upto = begin + state.cuts.pop(0) if state.cuts else len(content)
            self.wfile.write(content[begin:upto])
            if state.stalls:
                self.wfile.flush()
                state.stop.wait(20)

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        running.daemon_threads = True
        state = Server(running.server_port)
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield state
        state.stop.set()
        running.shutdown()
        thread.join()


@pytest.fixture
def cache_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GENATT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def sha256(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def offsets(server: Server) -> list[str | None]:
    return [asked for _, asked in server.asked]


# Downloads


def test_connection_cut_twice_goes_on_where_it_was(server: Server, tmp_path: Path):
    server.cuts = [300_000, 200_000]
    part = download.download(server.address(), tmp_path / "file", QUIET)
    assert part.read_bytes() == CONTENT
    first, second, third = offsets(server)
    assert first is None
    begins = [int(asked.removeprefix("bytes=").rstrip("-")) for asked in (second, third)]
    assert 200_000 < begins[0] <= 300_000 < begins[1] <= 500_000


def test_interrupted_run_is_continued_by_the_next(server: Server, tmp_path: Path):
    (tmp_path / "file.part").write_bytes(CONTENT[:1000])
    (tmp_path / "file.part.version").write_text('"1"')
    assert download.download(server.address(), tmp_path / "file", QUIET).read_bytes() == CONTENT
    assert offsets(server) == ["bytes=1000-"]


def test_server_without_ranges_sends_all_again(server: Server, tmp_path: Path):
    server.ranges, server.cuts = False, [300_000]
    assert download.download(server.address(), tmp_path / "file", QUIET).read_bytes() == CONTENT
    assert len(server.asked) == 2


def test_file_replaced_meanwhile_is_not_mixed(server: Server, tmp_path: Path):
    (tmp_path / "file.part").write_bytes(b"of another version")
    (tmp_path / "file.part.version").write_text('"0"')
    assert download.download(server.address(), tmp_path / "file", QUIET).read_bytes() == CONTENT


@pytest.mark.parametrize("etag", [None, 'W/"1"'])
def test_without_a_strong_version_nothing_is_continued(server: Server, tmp_path: Path, etag: str | None):
    server.etag, server.cuts = etag, [300_000]
    assert download.download(server.address(), tmp_path / "file", QUIET).read_bytes() == CONTENT
    assert offsets(server) == [None, None]


def test_part_longer_than_the_file_is_thrown_away(server: Server, tmp_path: Path):
    (tmp_path / "file.part").write_bytes(CONTENT + b"more")
    (tmp_path / "file.part.version").write_text('"1"')
    assert download.download(server.address(), tmp_path / "file", QUIET).read_bytes() == CONTENT


def test_busy_server_is_asked_again(server: Server, tmp_path: Path):
    server.statuses = [503]
    assert download.download(server.address(), tmp_path / "file", QUIET).read_bytes() == CONTENT


def test_missing_file_is_final(server: Server, tmp_path: Path):
    with pytest.raises(UnavailableError, match="HTTP 404"):
        download.download(server.address("/gone"), tmp_path / "file", QUIET)
    assert len(server.asked) == 1


def test_connection_that_is_always_cut_at_one_place_ends(server: Server, tmp_path: Path):
    server.ranges, server.cuts = False, [1000] * 99
    with pytest.raises(UnavailableError, match=r"IncompleteRead|Connection broken"):
        download.download(server.address(), tmp_path / "file", QUIET)
    assert len(server.asked) == 1 + len(download.WAITS)


def test_stalled_server_is_given_up(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(download, "STALL_SECONDS", 0.2)
    server.stalls, server.cuts = True, [1000] * 99
    with pytest.raises(UnavailableError, match=r"no byte for 0\.2 s"):
        download.download(server.address(), tmp_path / "file", QUIET)


def test_nobody_listens(server: Server, tmp_path: Path):
    with pytest.raises(UnavailableError, match=r"^[^<>\n]*refused[^<>\n]*$"):
        download.download("http://127.0.0.1:1/file", tmp_path / "file", QUIET)


def test_proxy_is_used_and_its_password_not_told(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("NO_PROXY")
    monkeypatch.setenv("HTTP_PROXY", f"http://user:secret@127.0.0.1:{server.port}")
    server.files["http://data.invalid/file"] = CONTENT
    assert download.download("http://data.invalid/file", tmp_path / "file", QUIET).read_bytes() == CONTENT
    monkeypatch.setenv("HTTP_PROXY", "http://user:secret@127.0.0.1:1")
    with pytest.raises(UnavailableError, match="HTTPS_PROXY") as caught:
        download.download("http://data.invalid/file", tmp_path / "other", QUIET)
    assert "secret" not in str(caught.value)


def test_malformed_proxy_password_is_not_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("HTTP_PROXY", "http://user:secret@[::bad")
    with pytest.raises(UnavailableError, match="not a valid host") as caught:
        download.download("http://data.invalid/file", tmp_path / "file", QUIET)
    assert "secret" not in str(caught.value)


def test_password_in_the_words_of_a_library_is_not_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    def refuse(*_: object, **__: object) -> None:
        raise requests.ConnectionError("cannot reach http://user:secret@proxy:80/ at all")

    monkeypatch.setattr(requests.Session, "get", refuse)
    monkeypatch.setattr(download, "WAITS", (0.01,))
    with pytest.raises(UnavailableError, match=r"^cannot reach http://proxy:80/ at all$"):
        download.download("http://data.invalid/file", tmp_path / "file", QUIET)


def test_disk_too_small_is_known_before_the_download(server: Server, cache_root: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(download.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10}))
    with pytest.raises(GenattError, match=r"cannot keep .*1,048,576 bytes to come, 10 free.*GENATT_CACHE"):
        cache.obtain("a-set", File("file", (server.address(),)), QUIET)


def test_progress_is_shown_unless_quiet(server: Server, tmp_path: Path):
    shown = io.StringIO()
    download.download(server.address(), tmp_path / "file", Console(file=shown, width=120))
    assert "file" in shown.getvalue()
    assert "1.0/1.0 MB" in shown.getvalue()
    silent = io.StringIO()
    download.download(server.address(), tmp_path / "other", Console(file=silent, quiet=True))
    with pytest.raises(UnavailableError):
        download.download(server.address("/gone"), tmp_path / "gone", Console(file=silent))
    assert silent.getvalue() == ""


@pytest.mark.parametrize(
    ("script", "seconds", "words"), [("exit 1", 5, "pip failed"), ("exec sleep 20", 0.2, "pip was not done")]
)
def test_pip_that_fails_or_hangs(
    script: str, seconds: float, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    pip = tmp_path / "pip"
    pip.write_text(f"#!/bin/sh\n{script}\n")
    pip.chmod(0o755)
    monkeypatch.setattr(download.sys, "executable", str(pip))
    monkeypatch.setattr(download, "PIP_SECONDS", seconds)
    with pytest.raises(UnavailableError, match=words):
        download.download("pip:recbole==1.2.1", tmp_path / "x.whl", QUIET)


# The cache


def test_cached_file_needs_no_network(server: Server, cache_root: Path):
    file = File("file", (server.address(),), sha256(CONTENT))
    path = cache.obtain("a-set", file, QUIET)
    assert (path, path.read_bytes()) == (cache_root / "a-set" / "file", CONTENT)
    assert cache.obtain("a-set", file, QUIET) == path
    assert len(server.asked) == 1
    assert sorted(entry.name for entry in path.parent.iterdir()) == ["file", "file.lock"]


def test_damaged_cache_is_fetched_again(server: Server, cache_root: Path):
    file = File("file", (server.address(),), sha256(CONTENT))
    cache.obtain("a-set", file, QUIET).write_bytes(b"damaged")
    assert cache.obtain("a-set", file, QUIET).read_bytes() == CONTENT


def test_wrong_hash_is_refused_and_leaves_nothing(server: Server, cache_root: Path):
    server.files["/file"] = b"<html>log in to this network</html>"
    with pytest.raises(UnavailableError, match=f"file has sha256:.* expected {sha256(CONTENT)}$"):
        cache.obtain("a-set", File("file", (server.address(),), sha256(CONTENT)), QUIET)
    assert [entry.name for entry in (cache_root / "a-set").iterdir()] == ["file.lock"]


def test_published_md5_is_compared(server: Server, cache_root: Path):
    good = File("file", (server.address(),), f"md5:{hashlib.md5(CONTENT).hexdigest()}")
    assert cache.obtain("a-set", good, QUIET).read_bytes() == CONTENT
    with pytest.raises(UnavailableError, match=r"has md5:.*expected md5:00"):
        cache.obtain("b-set", File("file", (server.address(),), "md5:00"), QUIET)


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_next_address_where_the_first_fails(scheme: str, server: Server, cache_root: Path):
    """It answers with 404, or with no TLS that can be trusted."""
    file = File("file", (f"{scheme}://127.0.0.1:{server.port}/gone", server.address()), sha256(CONTENT))
    assert cache.obtain("a-set", file, QUIET).read_bytes() == CONTENT


def test_first_download_without_a_hash_is_pinned(server: Server, cache_root: Path):
    file, shown = File("file", (server.address(),)), io.StringIO()
    path = cache.obtain("a-set", file, Console(file=shown, width=40))
    assert f"a-set: no hash of file is published: trusting this download ({sha256(CONTENT)})\n" in shown.getvalue()
    assert Path(f"{path}.sha256").read_text() == f"{sha256(CONTENT)[7:]}  file\n"
    assert cache.obtain("a-set", file, QUIET) == path
    assert len(server.asked) == 1

    path.unlink()
    server.files["/file"], server.etag = b"another", '"2"'
    with pytest.raises(UnavailableError, match=r"expected .* as at the first download; .* remove .*file\.sha256$"):
        cache.obtain("a-set", file, QUIET)


def test_hash_cut_off_by_a_crash_counts_for_none(server: Server, cache_root: Path):
    (cache_root / "a-set").mkdir(parents=True)
    (cache_root / "a-set" / "file.sha256").touch()
    path = cache.obtain("a-set", File("file", (server.address(),)), QUIET)
    assert Path(f"{path}.sha256").read_text() == f"{sha256(CONTENT)[7:]}  file\n"


def test_two_processes_do_not_mix(server: Server, cache_root: Path):
    (cache_root / "a-set").mkdir(parents=True)
    with (cache_root / "a-set" / "file.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(GenattError, match="downloaded by another process"):
            cache.obtain("a-set", File("file", (server.address(),)), QUIET)


def test_cache_that_cannot_be_written(cache_root: Path):
    cache_root.write_text("a file")
    with pytest.raises(GenattError, match=r"cannot keep .*cache/a-set/file.*GENATT_CACHE"):
        cache.obtain("a-set", File("file", ("http://127.0.0.1:1/",)), QUIET)


# Layouts

FLAGS = "|".join("1" if genre in ("Comedy", "Drama") else "0" for genre in movielens.GENRES)
ROWS_100K = b"196\t242\t3\t881250949\n186\t302\t3\t891717742\n"
CSV = {
    "ratings.csv": b"userId,movieId,rating,timestamp\n1,10,3.5,1112486027\n1,20,5.0,1112484676\n2,10,0.5,974820889\n",
    "movies.csv": 'movieId,title,genres\n10,"Amélie, Le (2001)",Comedy|Drama\n20,X,(no genres listed)\n'.encode(),
}
REVIEWS = (
    b'{"reviewerID": "A1", "asin": "B2", "helpful": [0, 1], "overall": 5.0, "unixReviewTime": 1369699200}\n'
    b'{"reviewerID": "A2", "asin": "B1", "reviewText": "\\u00e9", "overall": 4.0, "unixReviewTime": 1369699201}\n'
)
METADATA = (
    b"{'asin': 'B1', 'title': \"It's\", 'categories': [['Beauty', 'Hair'], ['Beauty', 'Skin']]}\n"
    b"{'asin': 'B9', 'title': __import__('os').system('false'), 'categories': []}\n"
    b"{'asin': 'B2', 'related': {'also_bought': ['B9']}, 'categories': [['Beauty']]}\n"
)


def zipped(members: dict[str, bytes], folder: str = "") -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in members.items():
            file.writestr(folder + name, content)
    return buffer.getvalue()


LAYOUTS = {
    "ml-100k.zip": zipped(
        {
            "ml-100k/u.data": ROWS_100K,
            "ml-100k/u.item": f"242|Kolya (1996)|24-Jan-1997||http://x|{FLAGS}\n".encode("latin-1"),
        }
    ),
    "recbole-1.2.1-py3-none-any.whl": zipped(
        {
            "ml-100k.inter": b"user_id:token\titem_id:token\trating:float\ttimestamp:float\n" + ROWS_100K,
            "ml-100k.item": b"i:token\tt:x\ty:x\tc:x\n242\tKolya\t1996\tComedy Drama\n",
        },
        "recbole/dataset_example/ml-100k/",
    ),
    "ml-1m.zip": zipped(
        {
            "ml-1m/ratings.dat": b"1::1193::5::978300760\n1::661::3::978302109\n",
            "ml-1m/movies.dat": b"661::Am\xe9lie: x\x85 (1996)::Comedy|Drama\n1193::One (1975)::Drama\n",
        }
    ),
    **{f"{name}.zip": zipped(CSV, f"{name}/") for name in ("ml-20m", "ml-25m", "ml-32m")},
    "reviews_Beauty_5.json.gz": gzip.compress(REVIEWS),
    "meta_Beauty.json.gz": gzip.compress(METADATA),
    "reviews_Toys_and_Games_5.json.gz": gzip.compress(REVIEWS),
}


@pytest.fixture
def served(server: Server, cache_root: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes `known` fetch a set from the server, with the counts given; files that are not in LAYOUTS are not there."""
    server.files = {f"/{name}": content for name, content in LAYOUTS.items()}

    def serve(name: str, users: int, items: int, rows: int, published: bool = True) -> None:
        original = SETS[name]
        origins = []
        for origin in original.origins:
            files = []
            for file in origin.files:
                digest = sha256(LAYOUTS[file.name]) if published and file.name in LAYOUTS else None
                files.append(replace(file, addresses=(server.address(f"/{file.name}"),), digest=digest))
            origins.append(replace(origin, files=tuple(files)))
        changed = replace(original, users=users, items=items, rows=rows, origins=tuple(origins))
        monkeypatch.setitem(sets.SETS, name, changed)

    return serve


def written(name: str, directory: Path) -> tuple[list[tuple], list[tuple]]:
    known.write(name, directory, quiet=True)
    log = pl.read_parquet(directory / "interactions.parquet")
    assert log.columns == ["user_id", "item_id", "rating", "timestamp"]
    assert log.schema["timestamp"] == pl.Int64
    return log.rows(), pl.read_parquet(directory / "items.parquet").rows()


ML_100K = (
    [(196, 242, 3.0, 881250949), (186, 302, 3.0, 891717742)],
    [(242, "Kolya (1996)", ["Comedy", "Drama"])],
)


@pytest.mark.parametrize("missing", ["recbole-1.2.1-py3-none-any.whl", "ml-100k.zip"])
def test_both_origins_of_ml_100k_give_the_same_tables(missing: str, served: Callable, server: Server, tmp_path: Path):
    served("ml-100k", 2, 2, 2)
    del server.files[f"/{missing}"]
    assert written("ml-100k", tmp_path) == ML_100K
    server.files.clear()  # from either cache, with no network
    assert written("ml-100k", tmp_path) == ML_100K
    assert (f"/{missing}", None) not in server.asked[2:]


def test_nothing_to_be_had(served: Callable, server: Server, tmp_path: Path):
    served("ml-100k", 2, 2, 2)
    server.files.clear()
    with pytest.raises(GenattError, match=r"grouplens.*HTTP 404.*recbole 1\.2\.1.*HTTP 404.*--data PATH.*synthetic"):
        known.write("ml-100k", tmp_path, quiet=True)


def test_ml_1m(served: Callable, tmp_path: Path):
    served("ml-1m", 1, 2, 2)
    log, items = written("ml-1m", tmp_path)
    assert log == [(1, 1193, 5.0, 978300760), (1, 661, 3.0, 978302109)]
    assert items == [(661, "Am\u00e9lie: x\u0085 (1996)", ["Comedy", "Drama"]), (1193, "One (1975)", ["Drama"])]


@pytest.mark.parametrize("name", ["ml-20m", "ml-25m", "ml-32m"])
def test_later_movielens(name: str, served: Callable, tmp_path: Path):
    served(name, 2, 2, 3)
    log, items = written(name, tmp_path)
    assert log == [(1, 10, 3.5, 1112486027), (1, 20, 5.0, 1112484676), (2, 10, 0.5, 974820889)]
    assert items == [(10, "Amélie, Le (2001)", ["Comedy", "Drama"]), (20, "X", [])]


def test_amazon_parses_only_its_own_items_and_runs_nothing(served: Callable, tmp_path: Path):
    served("amazon-beauty", 2, 2, 2)
    log, items = written("amazon-beauty", tmp_path)
    assert log == [("A1", "B2", 5.0, 1369699200), ("A2", "B1", 4.0, 1369699201)]
    assert items == [("B1", "It's", ["Beauty", "Hair", "Skin"]), ("B2", None, ["Beauty"])]


def test_missing_metadata_is_left_out(served: Callable, tmp_path: Path, capsys: pytest.CaptureFixture):
    served("amazon-toys", 2, 2, 2, published=False)
    known.write("amazon-toys", tmp_path)
    assert sorted(path.name for path in tmp_path.glob("*.parquet")) == ["interactions.parquet"]
    assert "no attributes of items: meta_Toys_and_Games.json.gz cannot be had (HTTP 404" in capsys.readouterr().err


@pytest.mark.parametrize(("counts", "words"), [((3, 2, 2), "2 users where the set has 3"), ((2, 2, 9), "2 rows .* 9")])
def test_another_content_under_the_same_address(
    counts: tuple, words: str, served: Callable, tmp_path: Path, cache_root: Path
):
    """Where no hash is published the counts are; what does not have them is not trusted from then on."""
    served("amazon-toys", *counts, published=False)
    with pytest.raises(GenattError, match=f"amazon-toys from snap.stanford.edu: {words}"):
        known.write("amazon-toys", tmp_path, quiet=True)
    left = sorted(path.name for path in (cache_root / "amazon-toys").iterdir())
    assert left == ["meta_Toys_and_Games.json.gz.lock", "reviews_Toys_and_Games_5.json.gz.lock"]


@pytest.mark.parametrize(
    "content", [b"<html>", zipped({"else/ratings.csv": b""}), LAYOUTS["ml-20m.zip"][:200], zipped({"a": b""})]
)
def test_archive_in_another_layout(content: bytes, served: Callable, server: Server, tmp_path: Path):
    served("ml-25m", 2, 2, 3, published=False)
    server.files["/ml-25m.zip"] = content
    with pytest.raises(GenattError, match=r"^ml-25m from files.grouplens.org: not in the layout[^\n]*--data PATH$"):
        known.write("ml-25m", tmp_path, quiet=True)


def test_directory_that_cannot_be_written(served: Callable, tmp_path: Path):
    served("ml-25m", 2, 2, 3)
    with pytest.raises(GenattError, match=r"ml-25m: cannot write .*nowhere"):
        known.write("ml-25m", tmp_path / "nowhere", quiet=True)


@pytest.mark.parametrize(("name", "rows"), [("ml-25m", 3), ("ml-1m", 2), ("amazon-toys", 2)])
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_full_disk_does_not_cost_the_download(name: str, rows: int, served: Callable, server: Server, tmp_path: Path):
    served(name, 1 if name == "ml-1m" else 2, 2, rows, published=False)
    (tmp_path / "interactions.parquet").symlink_to("/dev/full")
    with pytest.raises(GenattError, match=rf"^{name}: cannot write [^\n]*No space left[^\n]*: free space there$"):
        known.write(name, tmp_path, quiet=True)
    asked = [path for path, _ in server.asked]
    (tmp_path / "interactions.parquet").unlink()
    known.write(name, tmp_path, quiet=True)
    assert [path for path, _ in server.asked if "meta" not in path] == [path for path in asked if "meta" not in path]


# The table of sets


@pytest.mark.parametrize("name", known.NAMES)
def test_every_set_says_where_it_is_from_and_its_licence(name: str):
    text = known.describe(name)
    assert "\n" not in text
    assert "https://" in text
    assert SETS[name].licence in text


def test_what_has_no_published_hash_comes_over_tls_only():
    files = [file for one in SETS.values() for origin in one.origins for file in origin.files]
    assert all(address.startswith("https:") for file in files if not file.digest for address in file.addresses)
    lengths = {"sha256": 64, "md5": 32}
    for file in files:
        algorithm, _, value = (file.digest or sha256(b"")).partition(":")
        assert len(bytes.fromhex(value)) * 2 == lengths[algorithm]


def test_counts_are_those_of_the_shared_sets(shared_data: Path):
    for path in shared_data.glob("*/interactions.parquet"):
        if path.parent.name in SETS:
            log, one = pl.read_parquet(path), SETS[path.parent.name]
            assert (log["user_id"].n_unique(), log["item_id"].n_unique()) == (one.users, one.items)
            assert log.height == one.rows


def test_ml_100k_is_the_shared_one(shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Sorting the source's order stably by user and time gives the shared table, row by row."""
    if all(cache.cached("ml-100k", file) is None for origin in SETS["ml-100k"].origins for file in origin.files):
        pytest.skip("ml-100k is not in the cache; `genatt prepare ml-100k` puts it there")
    monkeypatch.setattr(requests.Session, "get", lambda *_, **__: pytest.fail("asked the network"))
    known.write("ml-100k", tmp_path, quiet=True)
    table = pl.read_parquet(tmp_path / "interactions.parquet").cast(pl.Int64)
    shared = pl.read_parquet(shared_data / "ml-100k" / "interactions.parquet").select(table.columns).cast(pl.Int64)
    assert table.sort("user_id", "timestamp", maintain_order=True).equals(shared)
