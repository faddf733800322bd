"""Requests to stop by signals and by calls, and the heartbeat that a probe looks at. No training, no torch."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from data_pipeline.errors import GenattError
from genatt_dist import config as configuration
from genatt_dist.training import heartbeat, preemption, stopped
from genatt_dist.training.stopped import STOPPED, advice, write_stopped

_PROGRAM = """
import os, sys, time
from genatt_dist.training import preemption
assert "torch" not in sys.modules
preemption.handle_signals(lambda reason: (print("early", reason, flush=True), os._exit(75)))
if sys.argv[1] == "serving":
    with preemption.serving():
        print("ready", flush=True)
        while preemption.requested() is None:
            time.sleep(0.01)
        print(preemption.requested().reason, flush=True)
        time.sleep(float(sys.argv[2]))
    print("over", flush=True)
else:
    print("ready", flush=True)
time.sleep(30)
"""


def started(*arguments: str) -> subprocess.Popen[str]:
    child = subprocess.Popen([sys.executable, "-c", _PROGRAM, *arguments], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    return child


def line(child: subprocess.Popen[str]) -> str:
    assert child.stdout is not None
    return child.stdout.readline().strip()


def test_the_first_reason_is_told_and_forgotten_at_the_end() -> None:
    with preemption.serving():
        assert preemption.requested() is None
        threads = [threading.Thread(target=preemption.request, args=(f"notice {number}",)) for number in range(3)]
        for thread in threads:
            thread.start()
            thread.join()
        for _ in range(1000):
            preemption.request("again")
        request = preemption.requested()
        assert request is not None
        assert request.reason == "notice 0"
        assert 0 <= time.monotonic() - request.asked < 10
    assert preemption.requested() is None


def test_sigterm_before_training_ends_the_process() -> None:
    child = started("not yet")
    child.send_signal(signal.SIGTERM)
    assert line(child) == "early SIGTERM"
    assert child.wait(10) == 75
    child.communicate()


def test_sigterm_is_a_request_and_ends_the_process_when_training_is_over() -> None:
    child = started("serving", "0.5")
    child.send_signal(signal.SIGTERM)
    assert line(child) == "SIGTERM"
    child.send_signal(signal.SIGTERM)  # a launcher and its parent both send it
    assert line(child) == "over"
    child.send_signal(signal.SIGTERM)
    assert child.wait(10) == 128 + signal.SIGTERM
    child.communicate()


def test_second_interrupt_ends_the_process_at_once() -> None:
    """But not the one that comes with the first: a terminal's and a launcher's."""
    child = started("serving", "30")
    child.send_signal(signal.SIGINT)
    assert line(child) == "SIGINT"
    child.send_signal(signal.SIGINT)
    time.sleep(preemption._ONE_PRESS_SECONDS + 0.2)
    assert child.poll() is None
    child.send_signal(signal.SIGINT)
    assert child.wait(10) == preemption.INTERRUPTED
    child.communicate()


def test_heartbeat_tells_a_probe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert heartbeat.main([str(tmp_path)]) == 1
    assert "cannot be read" in capsys.readouterr().err
    heartbeat.write(tmp_path, {"step": 7})
    assert heartbeat.main([str(tmp_path), "--max-age", "60"]) == 0
    beat = json.loads((tmp_path / heartbeat.HEARTBEAT).read_text())
    assert beat["step"] == 7
    (tmp_path / heartbeat.HEARTBEAT).write_text(json.dumps(beat | {"time": beat["time"] - 100}))
    assert heartbeat.main([str(tmp_path), "--max-age", "60"]) == 1
    assert "100 s old, more than 60 s" in capsys.readouterr().err
    (tmp_path / heartbeat.HEARTBEAT).write_text("[]")
    assert heartbeat.main([str(tmp_path)]) == 1


def test_probe_loads_nothing_heavy(tmp_path: Path) -> None:
    heartbeat.write(tmp_path, {})
    command = [sys.executable, "-X", "importtime", "-m", "genatt_dist.training.heartbeat", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    loaded = {text.rpartition("|")[2].strip().partition(".")[0] for text in done.stderr.splitlines()}
    assert not loaded & {"torch", "numpy", "pydantic", "psutil", "ray", "yaml"}


def test_who_says_first_why_a_run_stopped_is_believed(tmp_path: Path) -> None:
    write_stopped(tmp_path, "SIGTERM", 7, 0, 7)
    write_stopped(tmp_path, "rank 0 is lost", 6, 0, None)
    facts = json.loads((tmp_path / STOPPED).read_text())
    assert facts.pop("time") == pytest.approx(time.time(), abs=60)
    assert facts == {"reason": "SIGTERM", "step": 7, "epoch": 0, "checkpoint": 7, "rank": 0}
    write_stopped(tmp_path / "not there", "SIGTERM", 7, 0, 7)  # a host that does not see the directory
    assert "step 7" in advice(7)
    assert os.listdir(tmp_path) == [STOPPED]


def test_rank_0_is_believed_where_ranks_see_different_things(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A link that is cut: each side misses the other, whoever notices first."""
    monkeypatch.setattr(stopped, "_ROOT_SECONDS", 0.2)
    write_stopped(tmp_path, "rank 0 is lost", 6, 0, 5, rank=1)
    assert json.loads((tmp_path / STOPPED).read_text())["reason"] == "rank 0 is lost"
    write_stopped(tmp_path, "rank 1 is lost", 6, 0, 5)
    write_stopped(tmp_path, "rank 0 is lost", 6, 0, 5, rank=2)
    assert json.loads((tmp_path / STOPPED).read_text())["reason"] == "rank 1 is lost"
    assert os.listdir(tmp_path) == [STOPPED]


def test_rank_0_is_waited_for(tmp_path: Path) -> None:
    speaks = threading.Timer(0.3, write_stopped, (tmp_path, "rank 1 is lost", 6, 0, 5))
    speaks.start()
    write_stopped(tmp_path, "rank 0 is lost", 6, 0, 5, rank=1)
    speaks.join()
    assert json.loads((tmp_path / STOPPED).read_text())["reason"] == "rank 1 is lost"


def test_checkpoints_inside_an_epoch_need_the_loader() -> None:
    tree = {"data": {"path": "x", "feed": "ray"}, "training": {"checkpoint_every": 5}}
    with pytest.raises(GenattError, match=r"training.checkpoint_every=5 with data.feed=ray: .* data.feed=loader"):
        configuration.parse(tree, "a test")
