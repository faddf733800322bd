"""A whole preparation from and to S3, undisturbed and disturbed: the same bytes, or one line and nothing left."""

import hashlib
import json
import os
import random
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from genatt_process import genatt, left_after, wait_for
from in_process import prepare

from data_pipeline import inspection, storage
from data_pipeline import prepare as prepare_module
from data_pipeline.config import PrepareConfig
from data_pipeline.errors import GenattError
from data_pipeline.format import Manifest, load_manifest, verify
from data_pipeline.s3 import LIMIT_SECONDS
from genatt_dist.data.sequences import Sequences

pytestmark = pytest.mark.s3

SECONDS = 15.0  # within which an error that repeats itself is told
SECRET = "tests/only+secret"


@pytest.fixture
def log(s3, tmp_path: Path) -> str:
    """Three files of several row groups, in the bucket and below `tmp_path`."""
    draw = random.Random(0)
    rows = [(draw.randint(1, 30), draw.randint(1, 20), 1_700_000_000 + draw.randint(0, 40)) for _ in range(600)]
    frame = pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp"], orient="row")
    (tmp_path / "log").mkdir()
    for number in range(3):
        path = tmp_path / "log" / f"{number}.parquet"
        frame[200 * number : 200 * (number + 1)].write_parquet(path, row_group_size=40)
        s3.put(f"log/{number}.parquet", path.read_bytes())
    return f"{s3.url}/log"


def options(source: str | Path, out: str | Path, **changes: Any) -> PrepareConfig:
    cores = {"min_user_interactions": 16, "min_item_interactions": 20, "duplicates": "exact", "max_history": 18}
    tree = {"source": source, "out": out, "num_shards": 3, "rows_per_block": 40, **cores, **changes}
    return PrepareConfig.model_validate(tree)


@pytest.fixture
def local(log: str, tmp_path: Path) -> dict[str, Any]:
    """What an undisturbed preparation from disk to disk writes."""
    prepare(options(tmp_path / "log", tmp_path / "local"))
    return written(tmp_path / "local")


@pytest.fixture(scope="module")
def on_ray(s3_server) -> Iterator[Callable[[PrepareConfig], Manifest]]:
    """Runs preparations on one Ray, in a process whose environment leads to the store; errors come back from there."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "AWS_ENDPOINT_URL": s3_server.endpoint,
            "AWS_ACCESS_KEY_ID": "AKIATESTSONLY",
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": "us-east-1",
        }.items():
            patch.setenv(name, value)
        with ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=_start_ray) as process:
            yield lambda config: process.submit(prepare_module.prepare, config, progress=False).result(timeout=120)


def _start_ray() -> None:
    import atexit

    from data_pipeline.local_ray import local_ray

    running = local_ray(num_cpus=2)
    running.__enter__()
    atexit.register(running.__exit__, None, None, None)


def written(out: Path) -> dict[str, Any]:
    return _without_place({str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()})


def stored(s3, out: str) -> dict[str, Any]:
    return _without_place({name.removeprefix(f"{out}/"): s3.get(name) for name in s3.names(f"{out}/")})


def _without_place(files: dict[str, bytes]) -> dict[str, Any]:
    """sha256 of each file, and the manifest without what says where the source was."""
    manifest = json.loads(files.pop("manifest.json"))
    del manifest["config"]["source"], manifest["config_hash"]
    return {"manifest": manifest} | {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}


def refusal(function: Callable[..., Any], *arguments: Any) -> str:
    with pytest.raises(GenattError) as caught:
        function(*arguments)
    message = str(caught.value)
    assert "\n" not in message
    assert SECRET not in message
    return message


def assert_nothing_at(out: str) -> None:
    assert "is no prepared data set" in refusal(load_manifest, out)


@pytest.mark.parametrize("out", ["s3", "disk"])
def test_same_bytes_wherever_it_comes_from_and_goes_to(out: str, log: str, local: dict, s3, tmp_path: Path):
    if out == "disk":
        prepare(options(log, tmp_path / "out"))
        assert written(tmp_path / "out") == local
    else:
        prepare(options(log, f"{s3.url}/out"))
        assert stored(s3, "out") == local
        verify(f"{s3.url}/out", load_manifest(f"{s3.url}/out"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "on", [pytest.param("no ray", marks=pytest.mark.exhaustive), pytest.param("ray", marks=pytest.mark.ray)]
)
def test_bursts_of_refusals_change_nothing(on: str, log: str, local: dict, s3, faults, request: pytest.FixtureRequest):
    run = request.getfixturevalue("on_ray") if on == "ray" else prepare
    for method, number in (("GET", 12), ("PUT", 6)):
        faults.fail(next_n=number, methods=(method,))
    faults.cut(next_n=3, key="log/*")
    faults.refuse(next_n=2, methods=("PUT",))
    manifest = run(options(log, f"{s3.url}/out"))
    assert faults.failed == 12 + 6 + 3 + 2
    assert stored(s3, "out") == local
    assert load_manifest(f"{s3.url}/out") == manifest


@pytest.mark.ray
@pytest.mark.slow
def test_failures_on_ray_leave_nothing(log: str, s3, faults, on_ray: Callable):
    faults.vanish("log/1.parquet", after=1)
    message = refusal(on_ray, options(log, f"{s3.url}/out"))
    assert "1.parquet" in message
    assert s3.names("out/") == []
    faults.reset()
    faults.fail_always(status=403, code="AccessDenied", key="out/shards/*")
    message = refusal(on_ray, options(log, f"{s3.url}/out"))
    assert "denied" in message
    assert s3.names("out/") == []


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gives up after 1 s instead of 25, in this process."""
    from data_pipeline.s3 import S3

    patient = S3.__init__.__kwdefaults__
    monkeypatch.setattr("data_pipeline.s3.S3.__init__.__kwdefaults__", {**patient, "retry_seconds": 1.0})


@pytest.mark.parametrize("key", ["log/*", "out/shards/*", "out/vocabulary/*", "out/manifest.json"])
def test_permanent_refusal_ends_the_job(key: str, log: str, s3, faults, impatient, monkeypatch: pytest.MonkeyPatch):
    """From the moment on when all is planned."""
    num_shards = prepare_module.num_shards

    def then(*arguments: Any) -> int:
        faults.fail_always(key=key)
        return num_shards(*arguments)

    monkeypatch.setattr(prepare_module, "num_shards", then)
    start = time.monotonic()
    message = refusal(prepare, options(log, f"{s3.url}/out"))
    assert time.monotonic() - start < SECONDS
    assert "SlowDown" in message
    assert "(tried for " in message
    assert s3.endpoint.removeprefix("http://") in message
    assert s3.names("out/") == []
    faults.reset()
    assert_nothing_at(f"{s3.url}/out")


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("method", [pytest.param("GET", marks=pytest.mark.exhaustive), "PUT"])
def test_permanent_refusal_keeps_the_documented_limit(method: str, log: str, s3, faults, on_ray: Callable):
    faults.fail_always(key={"GET": "log/*", "PUT": "out/shards/*"}[method])
    start = time.monotonic()
    message = refusal(on_ray, options(log, f"{s3.url}/out"))
    assert time.monotonic() - start < LIMIT_SECONDS + SECONDS
    assert "SlowDown" in message
    assert s3.names("out/") == []


WRONG = {
    "key": ({"AWS_ACCESS_KEY_ID": "AKIAWRONG"}, "", ["InvalidAccessKeyId", "AWS_ACCESS_KEY_ID"]),
    "no key": (
        {"AWS_ACCESS_KEY_ID": None, "AWS_SECRET_ACCESS_KEY": None},
        "",
        ["no credentials", "AWS_ACCESS_KEY_ID", "AWS_PROFILE"],
    ),
    "bucket": ({}, "-missing", ["no bucket", "-missing", "check its name"]),
    "endpoint": ({"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, "", ["127.0.0.1:9", "AWS_ENDPOINT_URL"]),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("what", ["source", "out", "parent", "inspect", "load"])
def test_no_access_is_told_soon(what: str, wrong: str, log: str, s3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    environment, suffix, words = WRONG[wrong]
    bucket = f"{s3.url}{suffix}"
    for name, value in environment.items():
        monkeypatch.delenv(name) if value is None else monkeypatch.setenv(name, value)
    start = time.monotonic()
    message = {
        "source": lambda: refusal(prepare, options(f"{bucket}/log", tmp_path / "out")),
        "out": lambda: refusal(prepare, options(tmp_path / "log", f"{bucket}/out")),
        "parent": lambda: refusal(
            prepare, PrepareConfig(source=str(tmp_path / "log"), out=str(tmp_path / "out"), append_to=f"{bucket}/out")
        ),
        "inspect": lambda: refusal(inspection.inspect, f"{bucket}/out", 10),
        "load": lambda: refusal(Sequences.read, f"{bucket}/out"),
    }[what]()
    assert time.monotonic() - start < SECONDS
    assert [word for word in words if word not in message] == [], message
    assert [path.name for path in tmp_path.iterdir()] == ["log"]
    assert s3.names("out/") == []


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["prepare", "inspect", "train"])
def test_no_access_is_one_line_and_exit_code_2(verb: str, log: str, s3, tmp_path: Path):
    config = tmp_path / "run.yaml"
    config.write_text(f"data: {{path: '{s3.url}/out'}}")
    arguments = {
        "prepare": ("prepare", log, "--out", tmp_path / "out"),
        "inspect": ("inspect", f"{s3.url}/out"),
        "train": ("train", config, "--run", tmp_path / "run"),
    }[verb]
    start = time.monotonic()
    with genatt(*arguments, AWS_ENDPOINT_URL="http://127.0.0.1:9") as child:
        said, told = child.communicate(timeout=60)
    assert time.monotonic() - start < 2 * SECONDS  # with the start of Python
    assert (child.returncode, said, len(told.splitlines())) == (2, "", 1), told
    assert "127.0.0.1:9" in told
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_every_failing_write_leaves_nothing(log: str, s3, monkeypatch: pytest.MonkeyPatch):
    """The k-th write fails for every k; and once more without tidying up, as if the process had been killed there."""
    write, writes = storage._to_the_end, 0

    def fail_at(number: int) -> Callable[..., None]:
        def counted(*arguments: Any) -> None:
            nonlocal writes
            writes += 1
            if writes == number:
                raise PermissionError(13, "refused")
            write(*arguments)

        return counted

    monkeypatch.setattr(storage, "_to_the_end", fail_at(0))
    prepare(options(log, f"{s3.url}/whole", num_shards=1))
    total, out = writes, options(log, f"{s3.url}/out", num_shards=1)
    assert total == 5  # marker, shard, index, vocabulary, manifest
    for number in range(1, total + 1):
        writes = 0
        with monkeypatch.context() as patch:
            patch.setattr(storage, "_to_the_end", fail_at(number))
            assert "cannot write" in refusal(prepare, out)
            assert s3.names("out/") == []
            writes = 0
            patch.setattr(storage, "_remove", lambda *_: None)
            assert "cannot write" in refusal(prepare, out)
        assert len(s3.names("out/")) == number - 1
        assert_nothing_at(out.out)
        if number > 1:
            assert "was killed doing so: choose another --out, or remove it first" in refusal(prepare, out)
        assert len(s3.names("out/")) == number - 1
        for name in s3.names("out/"):
            s3.client.delete_object(Bucket=s3.bucket, Key=name)
    prepare(out)
    assert stored(s3, "out") == stored(s3, "whole")


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "sign", "group"),
    [
        pytest.param("read_block", signal.SIGINT, False, marks=pytest.mark.exhaustive),
        pytest.param("write", signal.SIGINT, True, marks=pytest.mark.exhaustive),
        ("write", signal.SIGTERM, False),
    ],
)
def test_stopped(stage: str, sign: signal.Signals, group: bool, log: str, s3, tmp_path: Path):
    marker = tmp_path / "there"
    command = ("prepare", log, "--out", f"{s3.url}/out", "--min-user", 1, "--min-item", 1, "--num-cpus", 1)
    with genatt(*command, stop_at=stage, marker=marker) as child:
        family = wait_for(marker, child)
        assert (stage == "write") == any("shards" in name for name in s3.names("out/"))
        os.killpg(child.pid, sign) if group else child.send_signal(sign)
        said, told = child.communicate(timeout=30)
        assert child.returncode == 128 + sign, told
        assert said == ""
        assert told.splitlines()[-1] == "stopped"
        assert "Traceback" not in told
        assert left_after(family, 10) == []
    time.sleep(1)
    assert s3.names("out/") == []


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("fails", [pytest.param(False, marks=pytest.mark.exhaustive), True])
def test_secrets_are_nowhere(fails: bool, log: str, s3, faults, tmp_path: Path):
    """Neither in what is written nor in what is said, nor in Ray's own logs."""
    secrets = {"AWS_SECRET_ACCESS_KEY": SECRET, "AWS_SESSION_TOKEN": "tests-session-token"}
    signed = "X-Amz-Signature=tests-signature&X-Amz-Credential=AKIATESTSONLY"
    if fails:
        faults.fail_always(status=403, code="AccessDenied", key="out/shards/*")
    session = tempfile.mkdtemp(prefix="ray", dir="/tmp")  # the names of Ray's sockets must be short
    try:
        command = ("prepare", log, "--out", f"{s3.url}/out", "--min-user", 1, "--min-item", 1, "--num-cpus", 1)
        with genatt(*command, RAY_TMPDIR=session, **secrets) as child:
            said, told = child.communicate(timeout=120)
        assert child.returncode == (2 if fails else 0), told
        logs = {path: path.read_bytes() for path in Path(session).rglob("*") if path.is_file()}
        assert any(path.name.startswith("worker-") for path in logs)
    finally:
        shutil.rmtree(session)
    everything = [said.encode(), told.encode(), *logs.values(), *(s3.get(name) for name in s3.names("out/"))]
    for url in (f"https://user:tests-password@127.0.0.1:9/log.parquet?{signed}", f"{s3.url}/gone.parquet?{signed}"):
        with genatt("prepare", url, "--out", tmp_path / "out", **secrets) as child:
            said, told = child.communicate(timeout=60)
        assert child.returncode == 2
        everything += [said.encode(), told.encode()]
    for secret in (*secrets.values(), "tests-password", "tests-signature"):
        assert not [content for content in everything if secret.encode() in content]
