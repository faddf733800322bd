"""Which files a SOURCE means: directories, globs, partitions, remote stores. Nothing is read here."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from data_pipeline import known
from data_pipeline.config import PrepareConfig
from data_pipeline.errors import GenattError
from data_pipeline.sources import Source, resolve

Options = Callable[..., PrepareConfig]


@pytest.fixture
def tree(tmp_path: Path) -> Callable[..., Path]:
    """Makes files of one byte, or of what they are given, below a fresh directory."""

    def make(*names: str, **contents: bytes) -> Path:
        for name, content in {**dict.fromkeys(names, b"x"), **contents}.items():
            path = tmp_path / "log" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        return tmp_path / "log"

    return make


@pytest.fixture
def memory() -> Iterator[MemoryFileSystem]:
    fs = fsspec.filesystem("memory")
    fs.store.clear()
    yield fs
    fs.store.clear()


def labels(source: Source) -> list[str]:
    return [file.label for file in source.files]


def test_directory_is_searched_in_depth_and_in_order(tree: Callable, options: Options, tmp_path: Path):
    root = tree("b/2.parquet", "b/10.parquet", "a.csv", "c/d/e.jsonl.gz", "notes.txt", "c/f.PQ")
    source = resolve(options(root), tmp_path)
    assert labels(source) == ["a.csv", "b/10.parquet", "b/2.parquet", "c/d/e.jsonl.gz", "c/f.PQ"]
    assert [file.format for file in source.files] == ["csv", "parquet", "parquet", "jsonl", "parquet"]


def test_what_writers_leave_beside_their_data_is_no_data(tree: Callable, options: Options, tmp_path: Path):
    hidden = ("_SUCCESS", ".a.parquet.crc", "_delta_log/0.json", "_temporary/0/b.parquet", ".ipynb_checkpoints/c.csv")
    root = tree("a.parquet", "day/b.parquet", *hidden)
    assert labels(resolve(options(root), tmp_path)) == ["a.parquet", "day/b.parquet"]
    assert labels(resolve(options(f"{root}/**/*.*"), tmp_path)) == ["a.parquet", "day/b.parquet"]
    assert labels(resolve(options(f"{root}/_temp*/**/*.parquet"), tmp_path)) == ["_temporary/0/b.parquet"]


def test_hidden_directories_above_the_source_hide_nothing(tree: Callable, options: Options, tmp_path: Path):
    root = tree("_old/.x/a.csv", "_old/.x/b.csv")
    assert labels(resolve(options(root / "_old" / ".x"), tmp_path)) == ["a.csv", "b.csv"]
    assert labels(resolve(options(f"{root}/_old/.x/*.csv"), tmp_path)) == ["a.csv", "b.csv"]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*.csv", ["1.csv", "2.csv"]),
        ("?.csv", ["1.csv", "2.csv"]),
        ("[13].csv", ["1.csv"]),
        ("[!1].csv", ["2.csv"]),
        ("**/*.csv", ["1.csv", "2.csv", "x/3.csv", "x/y/4.csv"]),
        ("x/**", ["3.csv", "5.parquet", "y/4.csv"]),
        ("*/*.csv", ["x/3.csv"]),
        ("x*", ["x/3.csv", "x/5.parquet", "x/y/4.csv"]),  # a directory that matches: what is in it
        ("*", ["1.csv", "2.csv", "x/3.csv", "x/5.parquet", "x/y/4.csv"]),
    ],
)
def test_globs(pattern: str, expected: list[str], tree: Callable, options: Options, tmp_path: Path):
    root = tree("1.csv", "2.csv", "x/3.csv", "x/y/4.csv", "x/5.parquet")
    assert labels(resolve(options(f"{root}/{pattern}"), tmp_path)) == expected


def test_paths_of_every_kind_mean_the_same_files(
    tree: Callable, memory: MemoryFileSystem, options: Options, tmp_path: Path
):
    root = tree("day=1/a.csv", "day=2/b.csv")
    for name in ("day=1/a.csv", "day=2/b.csv"):
        memory.pipe_file(f"/log/{name}", b"x")
    found = [resolve(options(path), tmp_path) for path in (root, f"{root}/", f"file://{root}", "memory://log")]
    for source in found:
        assert labels(source) == ["day=1/a.csv", "day=2/b.csv"]
        assert [file.partition for file in source.files] == [(("day", "1"),), (("day", "2"),)]
        assert source.name == "log"
    assert found[-1].files[0].path == "memory:///log/day=1/a.csv"


def test_partitions_are_decoded(tree: Callable, options: Options, tmp_path: Path):
    root = tree("site=a%2Fb%3D/day=__HIVE_DEFAULT_PARTITION__/x.csv", "site=c/site=d/y.csv", "=e/f=/z.csv")
    partitions = {file.label: dict(file.partition) for file in resolve(options(root), tmp_path).files}
    assert list(partitions.values()) == [{}, {"site": "a/b=", "day": None}, {"site": "d"}]


def test_partitions_above_the_source_count(tree: Callable, options: Options, tmp_path: Path):
    root = tree("day=7/hour=1/x.csv", "day=7/hour=2/x.csv")
    for path in (root / "day=7", f"{root}/day=7/hour=*/x.csv", f"{root}/day=7/*/*"):
        files = resolve(options(path), tmp_path).files
        assert [file.partition for file in files] == [(("day", "7"), ("hour", hour)) for hour in "12"]


def test_given_format_takes_files_of_any_name(tree: Callable, options: Options, tmp_path: Path):
    root = tree("part-00000", "part-00001", "_SUCCESS")
    files = resolve(options(root, format="csv", separator="|"), tmp_path).files
    assert [(file.label, file.format, file.separator) for file in files] == [
        ("part-00000", "csv", "|"),
        ("part-00001", "csv", "|"),
    ]


def test_given_format_leaves_out_files_of_other_formats(tree: Callable, options: Options, tmp_path: Path):
    assert labels(resolve(options(tree("a.csv", "b.parquet"), format="csv"), tmp_path)) == ["a.csv"]


def test_unknown_extension(tree: Callable, options: Options, tmp_path: Path):
    with pytest.raises(GenattError, match=r"events\.log: unknown extension.*or set format"):
        resolve(options(tree("events.log") / "events.log"), tmp_path)


@pytest.mark.parametrize("source", ["memory://log", "memory://log/**/*.csv", "memory://log/day=*/x.csv"])
def test_many_files_are_listed_at_once(
    source: str, memory: MemoryFileSystem, options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for day in range(500):
        memory.pipe_file(f"/log/day={day:03d}/x.csv", bytes(day + 1))
    calls = {"find": 0, "info": 0, "size": 0}
    for name in calls:
        plain = getattr(MemoryFileSystem, name)

        def counted(*args: object, plain: Callable = plain, name: str = name, **kwargs: object) -> object:
            calls[name] += 1
            return plain(*args, **kwargs)

        monkeypatch.setattr(MemoryFileSystem, name, counted)
    files = resolve(options(source), tmp_path).files
    assert [file.bytes for file in files] == list(range(1, 501))
    assert calls["find"] == 1
    assert calls["info"] <= 4
    assert calls["size"] == 0


def test_flat_glob_lists_no_directories(
    memory: MemoryFileSystem, options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for name in ("a.csv", "b.csv", "deep/c.csv", "deep/er/d.csv"):
        memory.pipe_file(f"/log/{name}", b"x")
    listed = []
    plain = MemoryFileSystem.ls
    monkeypatch.setattr(
        MemoryFileSystem, "ls", lambda fs, path, **options: listed.append(path) or plain(fs, path, **options)
    )
    assert labels(resolve(options("memory://log/*.csv"), tmp_path)) == ["a.csv", "b.csv"]
    assert not any("deep" in path for path in listed)


def test_new_files_show_in_the_same_process(memory: MemoryFileSystem, options: Options, tmp_path: Path):
    memory.pipe_file("/log/a.csv", b"x")
    assert len(resolve(options("memory://log"), tmp_path).files) == 1
    memory.pipe_file("/log/b.csv", b"x")
    assert len(resolve(options("memory://log"), tmp_path).files) == 2


def test_known_set_is_made_in_the_work_directory(options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def write(name: str, directory: Path) -> None:
        (directory / "interactions.parquet").write_text(name)
        (directory / "items.parquet").write_text("items")

    monkeypatch.setattr(known, "write", write)
    for name in known.NAMES:
        source = resolve(options(name, format="csv"), tmp_path)  # the format is that of the user's own log
        assert (source.name, labels(source), source.files[0].format) == (name, ["interactions.parquet"], "parquet")
        assert Path(source.files[0].path.removeprefix("file://")).read_text() == name
        assert source.items is not None


@pytest.mark.parametrize(
    ("near", "name"), [("amazon-sport", "amazon-sports"), ("ml100k", "ml-100k"), ("synthetics:users=5", "synthetic")]
)
def test_mistyped_names(near: str, name: str, options: Options, tmp_path: Path):
    with pytest.raises(GenattError, match="did you mean") as caught:
        resolve(options(near), tmp_path)
    assert f"did you mean {name!r}?" in str(caught.value)
    assert all(there in str(caught.value) for there in known.NAMES)


def test_items_must_be_one_file(tree: Callable, options: Options, tmp_path: Path):
    root = tree("a.csv", "b.csv")
    with pytest.raises(GenattError, match=r"items .*/log means 2 files, a\.csv first: name one of them"):
        resolve(options(root / "a.csv", items=str(root)), tmp_path)


@pytest.mark.parametrize(
    ("path", "name"),
    [("", "log"), ("/day=1", "log"), ("/day=1/a.v2.csv", "a"), ("/*/*.csv", "log"), ("/day=[1]/*", "log")],
)
def test_names_of_sources(path: str, name: str, tree: Callable, options: Options, tmp_path: Path):
    root = tree("day=1/a.v2.csv", "day=1/b.csv")
    assert resolve(options(f"{root}{path}"), tmp_path).name == name


def test_existing_path_with_wildcards_in_it_is_no_glob(tree: Callable, options: Options, tmp_path: Path):
    root = tree("[a]?.csv", "[b]/c.csv")
    assert labels(resolve(options(root / "[a]?.csv"), tmp_path)) == ["[a]?.csv"]
    assert labels(resolve(options(root / "[b]"), tmp_path)) == ["c.csv"]


def test_glob_without_a_match(tree: Callable, options: Options, tmp_path: Path):
    root = tree("a.csv")
    with pytest.raises(GenattError, match=r"no \.parquet, .*file there"):
        resolve(options(f"{root}/*.parquet"), tmp_path)
    with pytest.raises(GenattError, match=r"no \.parquet, .*file there|does not exist"):
        resolve(options(f"{root}/none/*.parquet"), tmp_path)


def test_links_are_followed_and_no_row_counts_twice(tree: Callable, options: Options, tmp_path: Path):
    root = tree("a.csv")
    (tmp_path / "elsewhere" / "deep").mkdir(parents=True)
    (tmp_path / "elsewhere" / "deep" / "b.csv").write_text("x")
    (root / "one").symlink_to(tmp_path / "elsewhere")
    (root / "two").symlink_to(tmp_path / "elsewhere")
    (root / "circle").symlink_to(root)
    (tmp_path / "link").symlink_to(root)
    assert labels(resolve(options(root), tmp_path)) == ["a.csv", "one/deep/b.csv"]
    assert labels(resolve(options(tmp_path / "link"), tmp_path)) == ["a.csv", "one/deep/b.csv"]


def test_directory_that_may_not_be_listed_is_not_left_out(
    tree: Callable, options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    root = tree("a.csv", "private/b.csv")
    plain = os.scandir

    def scandir(path: str) -> object:
        if "private" in str(path):
            raise PermissionError(13, "Permission denied", path)
        return plain(path)

    monkeypatch.setattr(os, "scandir", scandir)
    for source in (root, f"{root}/**/*.csv"):
        with pytest.raises(GenattError, match=r"cannot read .*Permission denied"):
            resolve(options(source), tmp_path)
