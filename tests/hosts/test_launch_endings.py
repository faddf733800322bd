"""What a launch makes of its end: stopped in order, killed, a mistake or a bug; and that nothing is left of it."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import psutil
import pytest

from data_pipeline.errors import GenattError, ResumableError
from genatt_dist.launch import launchers, worker
from genatt_dist.launch.ending import FAILED
from genatt_dist.launch.group import NOW, STOP, Group
from genatt_dist.launch.hosts import Host, Hosts
from genatt_dist.launch.places import Place, take
from genatt_dist.training.heartbeat import HEARTBEAT
from genatt_dist.training.options import TrainingConfig
from genatt_dist.training.stopped import STOPPED

_OBEDIENT = "import signal, sys, time; signal.signal(15, lambda *_: sys.exit(75)); print(1, flush=True); time.sleep(60)"
_DEAF = "import signal, time; signal.signal(15, signal.SIG_IGN); print(1, flush=True); time.sleep(60)"


class TestGroup:
    def _started(self, program: str) -> Group:
        group = Group([sys.executable, "-c", program], os.environ | {"PYTHONUNBUFFERED": "1"})
        time.sleep(0.5)
        return group

    def test_asked_to_stop_it_may_finish(self) -> None:
        assert self._started(_OBEDIENT).wait(lambda: STOP, 20) == 75

    def test_it_is_ended_after_a_time(self) -> None:
        started = time.monotonic()
        assert self._started(_DEAF).wait(lambda: STOP, 1) == -signal.SIGKILL
        assert time.monotonic() - started < 10

    def test_asked_twice_it_is_ended_at_once(self) -> None:
        started = time.monotonic()
        assert self._started(_DEAF).wait(lambda: NOW, 60) == -signal.SIGKILL
        assert time.monotonic() - started < 10

    def test_what_it_leaves_behind_is_ended(self, tmp_path: Path) -> None:
        started = f"subprocess.Popen([sys.executable, '-c', {_DEAF!r}]).pid"
        leave = f"import pathlib, subprocess, sys; pathlib.Path(sys.argv[1]).write_text(str({started}))"
        group = Group([sys.executable, "-c", leave, str(tmp_path / "pid")], os.environ)
        assert group.wait(lambda: 0, 1) == 0
        pid = int((tmp_path / "pid").read_text())
        assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


class TestHowALaunchEnds:
    @pytest.fixture
    def launched(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
        """Launches a program in place of the ranks; `run` is its directory."""

        def launched(program: str, launcher: str = "process") -> None:
            command = [sys.executable, "-c", f"import pathlib, sys; run = pathlib.Path({str(tmp_path)!r}); {program}"]
            monkeypatch.setitem(launchers._COMMANDS, launcher, lambda start: command)
            with take(launcher, Hosts(), 1) as place:
                launchers.launch(tmp_path, launcher, TrainingConfig(stop_seconds=1), place)

        return launched

    def test_ranks_that_stopped_in_order_can_go_on(self, launched: Callable[[str], None], tmp_path: Path) -> None:
        """Whatever the launcher's exit code: torchrun's is always 1."""
        facts = '{"reason": "SIGTERM", "step": 7, "epoch": 1, "checkpoint": 7}'
        with pytest.raises(ResumableError, match=r"stopped after step 7 \(epoch 2\): SIGTERM; go on from the"):
            launched(f"(run / 'stopped.json').write_text({facts!r}); sys.exit(1)")

    def test_ranks_that_could_not_say_so_can_go_on_too(self, launched: Callable[[str], None]) -> None:
        """Stopped while a resumed run began, or rank 0's host was lost, or its word is not seen here yet."""
        with pytest.raises(ResumableError, match="the same command again, with --resume where it has a checkpoint"):
            launched("sys.exit(75)")

    def test_an_earlier_stop_is_not_this_one(self, launched: Callable[[str], None], tmp_path: Path) -> None:
        for word in (STOPPED, HEARTBEAT, FAILED):
            (tmp_path / word).write_text('{"reason": "earlier", "step": 7, "epoch": 1}')
        with pytest.raises(GenattError, match="ended with exit code 3 under launcher=process") as caught:
            launched("sys.exit(3)")
        assert type(caught.value) is GenattError
        assert not any((tmp_path / word).exists() for word in (STOPPED, HEARTBEAT, FAILED))

    @pytest.mark.parametrize("program", ["os.kill(os.getpid(), 9)", "sys.exit(137)", "sys.exit(247)"])
    def test_a_killed_rank_is_no_mistake(self, launched: Callable[[str], None], program: str) -> None:
        """Of a worker, of torchrun, of deepspeed; also before the ranks have found each other."""
        with pytest.raises(ResumableError, match=r"ended without a word .* there is no checkpoint yet: begin afresh"):
            launched(f"import os; {program}")

    def test_ranks_that_leave_no_word_were_killed(self, launched: Callable[[str], None], tmp_path: Path) -> None:
        """Whatever the launcher's exit code; checkpoints that are not complete do not count."""
        saved = "(run / f'checkpoints/step-0000000{step}').mkdir(parents=True), step < 8 and "
        saved += "(run / f'checkpoints/step-0000000{step}/COMPLETE').write_text('{}')"
        began = f"[({saved}) for step in (6, 7, 8)]; (run / 'heartbeat.json').touch()"
        with pytest.raises(ResumableError, match=r"ended without a word \(exit code 1\): .* checkpoint of step 7 by"):
            launched(f"{began}; sys.exit(1)")

    def test_a_rank_that_said_why_was_not(self, launched: Callable[[str], None]) -> None:
        with pytest.raises(GenattError, match="ended with exit code 1 under launcher=process") as caught:
            launched("(run / 'heartbeat.json').touch(); (run / 'failed.json').touch(); sys.exit(1)")
        assert type(caught.value) is GenattError

    @pytest.mark.parametrize("error", [GenattError("no such key"), KeyError("item"), RuntimeError("out of\nmemory")])
    def test_a_rank_says_why_it_failed(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: Exception, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """A mistake is one line and code 2, a bug keeps its traceback; that another rank is gone is neither."""
        from genatt_dist import config
        from genatt_dist.training import train

        raised = [error, RuntimeError("Connection closed by peer")]
        for name in ("handle_signals", "end_with_launcher", "quiet"):
            monkeypatch.setattr(worker, name, lambda *_: None)
        monkeypatch.setattr(config, "load", lambda path: None)
        monkeypatch.setattr(train, "train", mock.Mock(side_effect=raised))
        monkeypatch.setattr(sys, "argv", ["worker", str(tmp_path), "--launcher", "process"])
        with pytest.raises(SystemExit if isinstance(error, GenattError) else type(error)):
            worker.main()
        facts = json.loads((tmp_path / FAILED).read_text())
        assert facts["error"] == f"{type(error).__name__}: {' '.join(str(error).split())}"
        assert facts["rank"] == 0
        (tmp_path / FAILED).unlink()
        with pytest.raises(SystemExit):
            worker.main()
        assert not (tmp_path / FAILED).exists()
        assert capsys.readouterr().err.endswith("rank 0: another rank ended; it says why\n")

    def test_hosts_on_which_nothing_begins(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setitem(launchers._COMMANDS, "deepspeed", lambda start: ["sleep", "60"])
        place = Place(Hosts(shell="mpich", start_seconds=0.5), 1, "cpu", machines=(Host("a", 1, 1),))
        with pytest.raises(GenattError, match=r"no rank of .* began within 0 s under --ssh=mpich"):
            launchers.launch(tmp_path, "deepspeed", TrainingConfig(), place)

    @pytest.mark.parametrize(("launcher", "heard"), [("process", signal.SIGINT), ("torchrun", signal.SIGTERM)])
    def test_a_signal_reaches_the_ranks_first(
        self, launched: Callable[..., None], tmp_path: Path, launcher: str, heard: int
    ) -> None:
        """As it came, where nothing stands between: torchrun and deepspeed would answer Ctrl-C by a traceback."""
        write = "lambda number, _: sys.exit((run / 'asked').write_text(str(number)) + 3)"
        ranks = f"import signal, time; [signal.signal(number, {write}) for number in (2, 15)]; time.sleep(60)"
        timer = threading.Timer(1, os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            launched(ranks, launcher)
        assert int((tmp_path / "asked").read_text()) == heard
