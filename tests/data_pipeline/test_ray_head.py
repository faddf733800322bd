"""A Ray whose start fails is started again; who starts it lives on."""

import os
import sys
import time
from pathlib import Path

import psutil
import pytest

from data_pipeline import ray_head
from data_pipeline.errors import GenattError
from data_pipeline.ray_address import ray_address
from data_pipeline.ray_head import RayHead

FAILS = """
import os, pathlib, sys
tries = pathlib.Path(os.environ["TRIES"])
tries.write_text(tries.read_text() + "x" if tries.exists() else "x")
if len(tries.read_text()) <= int(os.environ["FAILURES"]):
    print("core_worker.cc: Failed to register worker to Raylet: End of file", file=sys.stderr, flush=True)
    os._exit(1)
print("a line of somebody else")
print("Ray is up at 127.0.0.1:1", flush=True)
sys.stdin.read()
"""


def head(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, failures: int, program: str = FAILS) -> RayHead:
    monkeypatch.setattr(ray_head, "PROGRAM", (sys.executable, "-c", program))
    return RayHead({}, os.environ | {"TRIES": str(tmp_path / "tries"), "FAILURES": str(failures)})


def test_a_start_that_fails_is_tried_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    started = head(monkeypatch, tmp_path, failures=ray_head.ATTEMPTS - 1)
    assert started.address == "127.0.0.1:1"
    assert len((tmp_path / "tries").read_text()) == ray_head.ATTEMPTS
    process = psutil.Process(started._process.pid)
    started.end()
    assert not process.is_running()


def test_one_that_never_succeeds_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    with pytest.raises(GenattError, match=r"Ray cannot start: core_worker\.cc: Failed to register worker to Raylet"):
        head(monkeypatch, tmp_path, failures=ray_head.ATTEMPTS)
    assert len((tmp_path / "tries").read_text()) == ray_head.ATTEMPTS


def test_one_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(ray_head, "START_SECONDS", 0.2)
    began = time.monotonic()
    with pytest.raises(GenattError, match=r"Ray cannot start: its process ended with code -9"):
        head(monkeypatch, tmp_path, 0, "import time; time.sleep(60)")
    assert time.monotonic() - began < 20


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "127.0.0.1:99999999"])
def test_a_ray_that_does_not_answer_is_told_at_once(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(GenattError, match=f"no Ray answers at RAY_ADDRESS={address}: .*unset it"):
        ray_address()


@pytest.mark.parametrize("address", ["", "auto", "local"])
def test_other_words_are_rays_own(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    assert ray_address() == (address or None)
