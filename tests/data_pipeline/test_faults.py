"""What goes wrong on one machine while a log is prepared: the same bytes in the end, or one line and nothing left."""

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import ray
from genatt_process import genatt, left_after, wait_for
from in_process import prepare as prepare_in_process

from data_pipeline import prepare as prepare_module
from data_pipeline import storage
from data_pipeline.config import PrepareConfig
from data_pipeline.errors import GenattError
from data_pipeline.format import load_manifest, verify
from data_pipeline.prepare import prepare

Options = Callable[..., PrepareConfig]
Log = Callable[..., str]
STAGES = ("read_block", "split", "order", "encode", "bury", "write")
SPILLS = ["synthetic:users=60000,items=20000,rows=6000000", f"--object-store-bytes={1 << 27}"]  # some 100 MB of it


@pytest.fixture
def days(tmp_path: Path) -> Path:
    """A log in three files of several row groups."""
    draw = random.Random(0)
    rows = [(draw.randint(1, 30), draw.randint(1, 20), 1_700_000_000 + draw.randint(0, 40)) for _ in range(600)]
    frame = pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp"], orient="row")
    directory = tmp_path / "days"
    directory.mkdir()
    for number in range(3):
        part = frame[200 * number : 200 * (number + 1)]
        part.write_parquet(directory / f"{number}.parquet", row_group_size=40, compression="uncompressed")
    return directory


@pytest.fixture
def small(options: Options, days: Path, tmp_path: Path) -> Callable[..., PrepareConfig]:
    """The preparation of `days`, with rows dropped at every stage, into `out`."""

    def make(out: str = "out", **changes: Any) -> PrepareConfig:
        cores = {"min_user_interactions": 16, "min_item_interactions": 20, "duplicates": "exact", "max_history": 18}
        return options(days, **{"out": tmp_path / out, "num_shards": 3, "rows_per_block": 40, **cores, **changes})

    return make


def digests(directory: str | Path) -> dict[str, str]:
    files = (path for path in sorted(Path(directory).rglob("*")) if path.is_file())
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def refusal(config: PrepareConfig, run: Callable[..., object] = prepare_in_process) -> str:
    """The one line; nothing must be left, neither at `out` nor beside it."""
    beside = set(Path(config.out).parent.iterdir())
    with pytest.raises(GenattError) as caught:
        run(config)
    assert set(Path(config.out).parent.iterdir()) == beside
    assert "\n" not in str(caught.value)
    with pytest.raises(GenattError, match="is no prepared data set"):
        load_manifest(config.out)
    return str(caught.value)


def quietly(config: PrepareConfig) -> object:
    return prepare(config, progress=False)


# The source is not what it should be.


def cut_footer(days: Path) -> None:
    path = days / "1.parquet"
    path.write_bytes(path.read_bytes()[:-20])


def blank_body(days: Path) -> None:
    path = days / "1.parquet"
    content = path.read_bytes()
    path.write_bytes(content[:4] + bytes(300) + content[304:])


def cut_body(days: Path) -> None:
    """Rows are missing before a whole footer, as after a copy that went wrong in the middle."""
    path = days / "1.parquet"
    content = path.read_bytes()
    path.write_bytes(content[:4] + content[400:])


def change(days: Path, **columns: Any) -> None:
    path = days / "1.parquet"
    frame = pl.read_parquet(path).with_columns(**columns)
    path.unlink()
    frame.write_parquet(path)


NAN = pl.when(pl.int_range(pl.len()) == 3).then(float("nan")).otherwise(pl.col("item_id").cast(pl.Float64))
NULL = pl.when(pl.int_range(pl.len()) != 3).then(pl.col("user_id"))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (cut_footer, ["1.parquet", "no readable parquet file", "write it again, or take it out"]),
        (blank_body, ["1.parquet", "no readable parquet file", "write it again, or take it out"]),
        (cut_body, ["1.parquet", "no readable parquet file", "write it again, or take it out"]),
        (lambda days: change(days, user_id=NULL), ["'user_id'", "1.parquet", "1 null"]),
        (lambda days: change(days, item_id=NAN), ["'item_id'", "1.parquet"]),
        (lambda days: change(days, item_id=pl.col("item_id").cast(pl.String)), ["'item_id'", "1.parquet"]),
        (lambda days: change(days, timestamp=pl.col("timestamp") * 1000), ["'timestamp'", "1.parquet", "ms"]),
    ],
    ids=["footer", "body", "cut body", "null", "nan", "drift", "units"],
)
def test_damaged_source(damage: Callable[[Path], None], words: list[str], days: Path, small: Options):
    damage(days)
    message = refusal(small())
    assert [word for word in words if word not in message] == [], message


def test_column_missing_in_one_file(days: Path, small: Options):
    pl.read_parquet(days / "1.parquet").drop("item_id").write_parquet(days / "1.parquet")
    message = refusal(small())
    assert "'item_id'" in message
    assert "1.parquet" in message


def test_negative_ids_are_ids(days: Path, small: Options):
    for number in range(3):
        path = days / f"{number}.parquet"
        pl.read_parquet(path).with_columns(-pl.col("user_id"), -pl.col("item_id")).write_parquet(path)
    assert prepare_in_process(small()).num_users > 0


def test_file_in_milliseconds_beside_seconds_of_a_datetime_column(days: Path, small: Options):
    """Where the type tells the unit nothing has to be guessed, and nothing is refused."""
    expected = prepare_in_process(small())
    for number, unit in enumerate(("ms", "us", "ns")):
        path = days / f"{number}.parquet"
        time = pl.from_epoch("timestamp", time_unit="s").cast(pl.Datetime(unit))
        pl.read_parquet(path).with_columns(time).write_parquet(path)
    found = prepare_in_process(small("others"))
    assert (found.num_users, found.num_interactions) == (expected.num_users, expected.num_interactions)
    assert found.ledger == expected.ledger


@pytest.fixture
def during_the_job(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], None]], None]:
    """Does something when all has been planned, before anything is read."""

    num_shards = prepare_module.num_shards

    def at_start(action: Callable[[], None]) -> None:
        def then(*arguments: Any) -> int:
            action()
            return num_shards(*arguments)

        monkeypatch.setattr(prepare_module, "num_shards", then)

    return at_start


@pytest.mark.ray
@pytest.mark.parametrize("how", ["vanishes", "shrinks", "is another"])
def test_file_changes_during_the_job(
    how: str, days: Path, small: Options, during_the_job: Callable, local_cluster: None
):
    path, other = days / "1.parquet", pl.read_parquet(days / "1.parquet")
    during_the_job(
        {
            "vanishes": path.unlink,
            "shrinks": lambda: other[:40].write_parquet(path),
            "is another": lambda: other.with_columns(pl.col("user_id") + 1).write_parquet(path, row_group_size=30),
        }[how]
    )
    message = refusal(small(), quietly)
    assert "1.parquet" in message
    assert {"vanishes": "gone now", "shrinks": "", "is another": ""}[how] in message


# Writing fails.


def test_every_failing_write_leaves_nothing(small: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The k-th write fails for every k; and once more without tidying up, as if the process had been killed there."""
    write, writes = storage._to_the_end, 0

    def fail_at(number: int) -> Callable[..., None]:
        def counted(*arguments: Any) -> None:
            nonlocal writes
            writes += 1
            if writes == number:
                raise OSError(28, "No space left on device")
            write(*arguments)

        return counted

    monkeypatch.setattr(storage, "_to_the_end", fail_at(0))
    expected = prepare_in_process(small("whole"))
    total = writes
    assert total == 2 * len(expected.files) + 2
    for number in range(1, total + 1):
        for tidy in (shutil.rmtree, lambda *_, **__: None):
            writes = 0
            with monkeypatch.context() as patch:
                patch.setattr(storage, "_to_the_end", fail_at(number))
                patch.setattr(storage.shutil, "rmtree", tidy)
                with pytest.raises(GenattError, match=r"^cannot write .*No space left on device"):
                    prepare_in_process(small())
        for directory in {"out", *(path.name for path in tmp_path.glob("out.tmp-*"))}:
            with pytest.raises(GenattError, match="is no prepared data set"):
                load_manifest(str(tmp_path / directory))
    assert len(list(tmp_path.glob("out.tmp-*"))) == total  # of those that did not tidy up
    prepare_in_process(small())
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


# Ray's workers end.


def killed(stage: str, marks: Path, times: int, early: bool) -> Callable[..., Any]:
    """The task of `stage`, whose first `times` workers are killed before (`early`) or after its work."""

    def strike() -> None:
        import os
        import signal

        for number in range(times):
            try:
                os.close(os.open(f"{marks}/{stage}-{number}", os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                continue
            os.kill(os.getpid(), signal.SIGKILL)

    def read_block(*arguments: Any, **options: Any) -> Any:
        from data_pipeline import tasks

        if early:
            strike()
        yield from tasks.read_block(*arguments, **options)
        strike()

    def other(*arguments: Any) -> Any:
        from data_pipeline import tasks

        if early:
            strike()
        result = getattr(tasks, stage)(*arguments)
        strike()
        return result

    return read_block if stage == "read_block" else other


@pytest.mark.ray
@pytest.mark.parametrize("early", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_killed_workers_change_nothing(
    early: bool, small: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, local_cluster: None
):
    """At every stage one worker is killed; the manifest, and so the ledger, is the undisturbed one to the byte."""
    expected = prepare_in_process(small("whole"))
    (tmp_path / "marks").mkdir()
    for stage in STAGES:
        monkeypatch.setattr(prepare_module.tasks, stage, killed(stage, tmp_path / "marks", 1, early))
    assert quietly(small()) == expected
    assert {path.name for path in (tmp_path / "marks").iterdir()} == {f"{stage}-0" for stage in STAGES}
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")
    assert all(sum(entry.dropped.values()) for entry in expected.ledger[1:])


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize("stage", ["read_block", "order", "write"])
def test_workers_killed_at_every_try(
    stage: str, small: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, local_cluster: None
):
    (tmp_path / "marks").mkdir()
    monkeypatch.setattr(prepare_module.tasks, stage, killed(stage, tmp_path / "marks", 1000, early=False))
    message = refusal(small(rows_per_block=1000), quietly)
    assert "the worker of a task was killed each time it was tried (out of memory?)" in message
    assert "--num-cpus" in message


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(150)
def test_killed_raylet(days: Path, tmp_path: Path):
    """Ray may end the driver itself then, at once: so what counts is that it does not hang and nothing is published."""
    out, marker = tmp_path / "out", tmp_path / "there"
    options = ("--out", out, "--min-user", 1, "--min-item", 1, "--num-cpus", 1, "--json")
    with genatt("prepare", days, *options, stop_at="write", marker=marker) as child:
        family = wait_for(marker, child)
        (raylet,) = (process for process in family if process.name() == "raylet")
        raylet.kill()
        said, told = child.communicate(timeout=60)
        assert child.returncode in (1, 2), told
        assert said == ""
        assert "Traceback" not in told
        left = left_after(family, 15)
        assert [name for name in left if not name.endswith("Agent")] == []
    for path in (out, *tmp_path.glob("out.tmp-*")):
        with pytest.raises(GenattError, match="is no prepared data set"):
            load_manifest(str(path))
    prepare_in_process(PrepareConfig(source=str(days), out=str(out)))


# The disk is full where Ray spills to.


def assert_says_disk_full(child: subprocess.Popen, out: Path, where: str) -> None:
    said, told = child.communicate(timeout=120)
    assert child.returncode == 2, told
    assert said == ""
    last = told.splitlines()[-1]
    assert last.startswith("error: stage ")
    assert f"Ray's object store is full, and so is the disk of {where}" in last
    assert "--object-store-bytes" in last
    assert "Traceback" not in told
    assert sorted(out.parent.glob("out*")) == []


@pytest.mark.ray
@pytest.mark.exhaustive
@pytest.mark.timeout(150)
def test_disk_over_rays_threshold(tmp_path: Path):
    out = tmp_path / "out"
    with genatt("prepare", *SPILLS, "--out", out, "--json", RAY_local_fs_capacity_threshold="0.0001") as child:
        assert_says_disk_full(child, out, "/")


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(150)
def test_full_spill_directory(tmp_path: Path):
    """A disk of 8 MB, mounted where nobody else sees it."""
    out, tiny = tmp_path / "out", tmp_path / "tiny"
    tiny.mkdir()
    mount = f"mount -t tmpfs -o size=8m tmpfs {tiny}"
    if subprocess.run(["unshare", "-rm", "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("no mounts of one's own here")
    words = [sys.executable, "-m", "genatt_dist.cli", "prepare", *SPILLS, "--out", str(out), "--json"]
    script = f'{mount} && exec "$@"'
    child = subprocess.Popen(
        ["unshare", "-rm", "sh", "-c", script, "sh", *words],
        env=os.environ | {"RAY_object_spilling_directory": str(tiny)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert_says_disk_full(child, out, str(tiny))
    finally:
        child.kill()
        child.communicate()


# It is told to stop.


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(150)
@pytest.mark.parametrize(
    ("stage", "sign", "group"),
    [
        pytest.param("read_block", signal.SIGTERM, False, marks=pytest.mark.exhaustive),
        ("order", signal.SIGINT, True),
        pytest.param("write", signal.SIGINT, False, marks=pytest.mark.exhaustive),
        pytest.param("write", signal.SIGTERM, False, marks=pytest.mark.exhaustive),
    ],
)
def test_stopped(stage: str, sign: signal.Signals, group: bool, days: Path, tmp_path: Path):
    out, marker = tmp_path / "out", tmp_path / "there"
    options = ("--out", out, "--min-user", 1, "--min-item", 1, "--num-cpus", 1)
    with genatt("prepare", days, *options, stop_at=stage, marker=marker) as child:
        family = wait_for(marker, child)
        if stage == "write":
            assert list(tmp_path.glob("out.tmp-*/shards/*"))
        os.killpg(child.pid, sign) if group else child.send_signal(sign)
        said, told = child.communicate(timeout=30)
        assert child.returncode == 128 + sign, told
        assert said == ""
        assert told.splitlines()[-1] == "stopped"
        assert "Traceback" not in told
        assert left_after(family, 10) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["days", "there"]


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(150)
def test_killed_and_started_again(days: Path, small: Options, tmp_path: Path):
    out, marker = tmp_path / "out", tmp_path / "there"
    with genatt("prepare", days, "--out", out, stop_at="write", marker=marker) as child:
        family = wait_for(marker, child)
        child.kill()
        child.communicate(timeout=30)
        left = left_after(family, 15)  # Ray's processes do not outlive theirs, but for agents that ask a dead Ray first
        assert [name for name in left if not name.endswith("Agent")] == []
    (half,) = tmp_path.glob("out.tmp-*")
    assert list(half.glob("shards/*"))
    for path in (out, half):
        with pytest.raises(GenattError, match="is no prepared data set"):
            load_manifest(str(path))
    manifest = prepare_in_process(small())
    verify(str(out), manifest)


# Somebody else's Ray.


@pytest.mark.ray
def test_ray_that_runs_is_used_and_stays(days: Path, small: Options, tmp_path: Path, local_cluster: None):
    expected, node = prepare_in_process(small("whole")), ray.get_runtime_context().get_node_id()
    assert quietly(small()) == expected
    cut_footer(days)
    refusal(small("another"), quietly)
    assert ray.get_runtime_context().get_node_id() == node
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


@pytest.mark.ray
@pytest.mark.slow
def test_ray_of_ray_address_is_used_and_stays(days: Path, small: Options, tmp_path: Path, local_cluster: None):
    prepare_in_process(small("whole"))
    config = tmp_path / "options.yaml"
    config.write_text(json.dumps(small().model_dump(exclude={"split", "source", "out"}, exclude_none=True)))
    address = ray.get_runtime_context().gcs_address
    command = ("prepare", days, "--out", tmp_path / "out", "--config", config, "--json")
    with genatt(*command, RAY_ADDRESS=address) as child:
        said, told = child.communicate(timeout=120)
        assert child.returncode == 0, told
        assert json.loads(said)["users"] > 0
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")
    assert ray.get(ray.remote(lambda: 1).remote()) == 1


@pytest.mark.ray
def test_nothing_is_written_after_a_failure_in_somebody_elses_ray(
    small: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, local_cluster: None
):
    """One shard cannot be written; the other is being written then, and must not come after the tidying up."""

    def write(shard: int, *arguments: Any) -> Any:
        import time
        from pathlib import Path

        from data_pipeline import tasks
        from data_pipeline.errors import GenattError

        if shard == 0:
            while not Path(f"{marks}/writing").exists():
                time.sleep(0.01)
            raise GenattError("cannot write shard 0")
        Path(f"{marks}/writing").touch()
        time.sleep(2)
        return tasks.write(shard, *arguments)

    marks = tmp_path / "marks"
    marks.mkdir()
    monkeypatch.setattr(prepare_module.tasks, "write", write)
    assert refusal(small(num_shards=2), quietly) == "cannot write shard 0"
    time.sleep(3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["days", "marks"]
