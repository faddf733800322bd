"""A run directory at a URL is what the directory on a node's disk was, without its checkpoints."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from tiny_data import run_config

from data_pipeline.errors import GenattError
from data_pipeline.storage import read_bytes
from genatt_dist import run_storage

FILES = {
    "config.yaml": "world_size: 2\n",
    "metrics.jsonl": '{"step": 1}\n',
    "tensorboard/events.1": "curve",
    "evaluation-test.json": "{}",
}
NOT = {"checkpoints/step-00000001/COMPLETE": "", ".summary.12": "torn", "tensorboard/.events.swap": "torn"}


@pytest.fixture(params=["memory", "file"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "file":
        yield f"file://{tmp_path}/store/runs/a"
        return
    place = f"memory://{secrets.token_hex(4)}/runs/a"
    yield place
    fsspec.filesystem("memory").store.clear()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for name, content in (FILES | NOT).items():
        place = tmp_path / "run" / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(content)
    return tmp_path / "run"


def test_what_is_published_is_fetched_elsewhere(url: str, run: Path, tmp_path: Path) -> None:
    mirror = run_storage.Mirror(url, run)
    mirror.publish()
    assert run_storage.names(url) == sorted(FILES)
    run_storage.fetch(url + "/", tmp_path / "other")
    found = {
        path.relative_to(tmp_path / "other").as_posix(): path.read_text()
        for path in (tmp_path / "other").rglob("*")
        if path.is_file()
    }
    assert found == FILES


def test_changes_and_removals_follow(url: str, run: Path) -> None:
    mirror = run_storage.Mirror(url, run)
    mirror.publish()
    with (run / "metrics.jsonl").open("a") as log:
        log.write('{"step": 2}\n')
    (run / "summary.json").write_text("{}")
    (run / "evaluation-test.json").unlink()
    mirror.publish()
    assert run_storage.names(url) == sorted(FILES.keys() - {"evaluation-test.json"} | {"summary.json"})
    assert read_bytes(f"{url}/metrics.jsonl").count(b"\n") == 2
    run_storage.remove(url, "summary.json")
    run_storage.remove(url, "summary.json")
    assert "summary.json" not in run_storage.names(url)


def test_only_what_changed_is_sent(url: str, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent = []
    monkeypatch.setattr(run_storage, "write_bytes", lambda path, content: sent.append(path.removeprefix(url)))
    mirror = run_storage.Mirror(url, run)
    mirror.publish()
    assert len(sent) == len(FILES)
    (run / "metrics.jsonl").write_text("changed")
    mirror.publish()
    assert sent[len(FILES) :] == ["/metrics.jsonl"]


def test_mirrored_while_the_block_runs_and_after_it(url: str, run: Path) -> None:
    with run_storage.mirrored(url, run, every=0.05):
        deadline = time.monotonic() + 10
        while run_storage.names(url) != sorted(FILES):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        (run / "summary.json").write_text("{}")
    assert "summary.json" in run_storage.names(url)


def test_a_store_that_fails_is_told_once_and_hides_no_other_error(
    url: str, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(path: str, content: bytes) -> None:
        raise GenattError("cannot write: no such bucket")

    monkeypatch.setattr(run_storage, "write_bytes", refuse)
    with pytest.raises(GenattError, match="no such bucket"), run_storage.mirrored(url, run, every=0.02):
        time.sleep(0.3)
    assert capsys.readouterr().err.count("is behind") == 1
    with pytest.raises(ZeroDivisionError), run_storage.mirrored(url, run, every=10):
        raise ZeroDivisionError


def test_nothing_there_is_no_error(url: str, tmp_path: Path) -> None:
    assert run_storage.names(url) == []
    run_storage.fetch(url, tmp_path / "none")
    assert list((tmp_path / "none").iterdir()) == []


def test_checkpoints_lie_at_the_url_unless_the_run_says_where() -> None:
    config = run_config("-")
    assert run_storage.stored_at(config, "s3://b/a/").training.checkpoint.path == "s3://b/a/checkpoints"
    own = run_config("-", training={"checkpoint": {"path": "s3://b/other"}})
    assert run_storage.stored_at(own, "s3://b/a") == own
    assert run_storage.is_url("s3://b/a")
    assert not run_storage.is_url(Path("runs/a"))
