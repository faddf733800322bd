"""Runs over two hosts (network namespaces): the same losses as on one, and what happens when a host is cut off."""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import yaml
from fault_results import figures
from tiny_data import histories, run_tree, write_prepared
from two_hosts import TwoHosts, missing, two_hosts

from genatt_dist import runs
from genatt_dist.training.checkpoint.store import Store
from genatt_dist.training.options import TrainingConfig

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(600)]

_START_SECONDS, _NAMED_SECONDS = 300, 60
_HOSTFILE = "host-a slots=1\nhost-b slots=1  # beside it\n"
_AT_RENDEZVOUS = ("--nnodes", 2, "--rendezvous", "10.77.0.1:29400")
SECRET = "not-to-be-seen"
_OTHERS = ("torchrun", "pdsh")
_WITHOUT_END = ("training.epochs=100000", "training.patience=100000")
_QUICK = "training.silence_seconds=10"


@dataclass
class Case:
    """A run of D-GenAtt on two ranks, that two hosts can start."""

    hosts: TwoHosts
    directory: Path
    config: Path
    hostfile: Path

    def start(self, host: str, run: Path, *more: object) -> subprocess.Popen:
        words = ("train", self.config, "--run", run, "world_size=2", *more)
        return self.hosts.genatt(host, *words, log=self.log(run, host), AWS_SECRET_ACCESS_KEY=SECRET)

    def log(self, run: Path, host: str = "a") -> Path:
        return self.directory / f"{run.name}-{host}.log"

    def both(self, run: Path, launcher: str, *more: object) -> dict[str, subprocess.Popen]:
        """What the user starts for a run over both hosts: one command, or the same on each."""
        if launcher == "torchrun":
            return {host: self.start(host, run, *_AT_RENDEZVOUS, *more) for host in "ba"}
        return {"a": self.start("a", run, "--hostfile", self.hostfile, "--ssh", launcher, *more)}


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    if reason := missing():
        pytest.skip(f"no second host: {reason}")
    directory = tmp_path_factory.mktemp("hosts")
    write_prepared(directory / "shards", histories(users=120))
    tree = run_tree(directory / "shards")
    tree["model"]["attention"] = {"type": "diffusion"}
    tree["table"] = {"kind": "sharded"}
    tree["training"]["checkpoint_every"] = 3
    config, hostfile = directory / "config.yaml", directory / "hostfile"
    config.write_text(yaml.safe_dump(tree))
    hostfile.write_text(_HOSTFILE)
    with two_hosts(directory) as hosts:
        yield Case(hosts, directory, config, hostfile)


@pytest.fixture(scope="module")
def one_host(case: Case) -> list[float]:
    """Losses of the same run with both ranks on one host."""
    run = case.directory / "one-host"
    _ends(case.start("a", run, "--launcher", "torchrun"), case.log(run))
    return list(_losses(run).values())


def _losses(run: Path) -> dict[int, float]:
    """By step; a step that was done twice counts as it was done last."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {one["step"]: one["loss"] + one["generative_loss"] for one in records if one["kind"] == "train"}


def _ends(process: subprocess.Popen, log: Path, code: int = 0, seconds: float = _START_SECONDS) -> str:
    """Its output, once it has ended as it should."""
    try:
        assert process.wait(seconds) == code, log.read_text()
    except subprocess.TimeoutExpired:
        process.kill()
        pytest.fail(f"it did not end within {seconds:.0f} s: {log.read_text()}")
    return log.read_text()


def _wait(what: Callable[[], bool], processes: dict[str, subprocess.Popen], seconds: float = _START_SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert all(process.poll() is None for process in processes.values()), "it has ended"
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.1)


def _environment_of_rank_1(hosts: TwoHosts) -> dict[str, str]:
    """{} before it is there."""
    for process in hosts.processes("b"):
        with suppress(psutil.Error):
            if "genatt_dist.launch.worker" in process.cmdline() and "RANK" in (environment := process.environ()):
                return environment
    return {}


@pytest.mark.parametrize("launcher", ["ssh", *(pytest.param(name, marks=pytest.mark.exhaustive) for name in _OTHERS)])
def test_two_hosts_train_as_one(case: Case, one_host: list[float], launcher: str) -> None:
    """Noise, dropout and negatives are keyed, so that the losses are those of the same ranks side by side."""
    run = case.directory / f"two-{launcher}"
    processes = case.both(run, launcher)
    _wait(lambda: _environment_of_rank_1(case.hosts) != {}, processes)
    # By pdsh everything travels on command lines, so that credentials do not travel at all.
    assert _environment_of_rank_1(case.hosts).get("AWS_SECRET_ACCESS_KEY") == (None if launcher == "pdsh" else SECRET)
    assert not any(SECRET in line for line in case.hosts.left(0))
    for host, process in processes.items():
        assert SECRET not in _ends(process, case.log(run, host))
    summary = json.loads((run / "summary.json").read_text())
    assert summary["train"]["world_size"] == 2
    assert summary["train"]["launcher"] == ("torchrun" if launcher == "torchrun" else "deepspeed")
    with figures(f"two_hosts_of_one_rank_{launcher}") as found:
        found |= {"records": len(one_host), "tolerance": 1e-6}
        difference = max(abs(a - b) for a, b in zip(one_host, _losses(run).values(), strict=True))
        found["largest_loss_difference_from_one_host_of_two"] = difference
        assert difference <= 1e-6
    assert case.hosts.left(10) == []


_DEFAULT = TrainingConfig().silence_seconds


@pytest.mark.parametrize(
    ("launcher", "silence"),
    [
        ("ssh", 10.0),
        pytest.param("torchrun", 10.0, marks=pytest.mark.exhaustive),
        pytest.param("ssh", _DEFAULT, marks=pytest.mark.exhaustive),
        pytest.param("torchrun", _DEFAULT, marks=pytest.mark.exhaustive),
    ],
)
def test_a_host_that_is_cut_off_is_named(case: Case, launcher: str, silence: float) -> None:
    """Its cable is pulled in the middle of training: the ranks on both sides end by themselves, and say who is lost.
    FAULT_RESULTS=FILE keeps how long that took, here and in the tests below.
    """
    run = case.directory / f"cut-{launcher}-{silence:.0f}"
    processes = case.both(run, launcher, *_WITHOUT_END, f"training.silence_seconds={silence}")
    _wait(lambda: (run / "metrics.jsonl").exists() and len(_losses(run)) > 3, processes)
    case.hosts.cut("b")
    cut = time.monotonic()
    try:
        with figures(f"link_cut_{launcher}_silence_{silence:.0f}") as found:
            found |= {"silence_seconds": silence, "default": silence == _DEFAULT, "limit_seconds": _NAMED_SECONDS}
            while "rank 1 " not in (output := case.log(run).read_text()) or "is lost" not in output:
                assert time.monotonic() < cut + _NAMED_SECONDS, output
                time.sleep(0.1)
            found["seconds_to_the_error"] = round(time.monotonic() - cut, 1)
            output = _ends(processes["a"], case.log(run), 75, _NAMED_SECONDS - (time.monotonic() - cut))
            found["seconds_to_the_end"] = round(time.monotonic() - cut, 1)
            assert "--resume" in output
            assert case.hosts.left(_NAMED_SECONDS - (time.monotonic() - cut)) == []
            found["seconds_to_the_end_on_both_hosts"] = round(time.monotonic() - cut, 1)
    finally:
        case.hosts.mend("b")
        for process in processes.values():
            process.kill()
            process.wait()


@pytest.mark.exhaustive
def test_a_run_goes_on_where_one_host_is_left(case: Case) -> None:
    """Over two hosts, one of them cut off, then with both ranks on the other: the losses of an undisturbed run."""
    more = ("training.epochs=30", "training.patience=100", _QUICK)
    run, whole = case.directory / "goes-on", case.directory / "undisturbed"
    _ends(case.start("a", whole, "--launcher", "torchrun", *more), case.log(whole))
    processes = case.both(run, "ssh", *more)
    _wait(lambda: (run / "checkpoints").is_dir() and len(_losses(run)) > 5, processes)
    case.hosts.cut("b")
    try:
        with figures("remaining_host") as found:
            _ends(processes["a"], case.log(run), 75, _NAMED_SECONDS)
            left = case.directory / "left"
            left.write_text("host-a slots=2\n")
            output = _ends(case.start("a", run, "--hostfile", left, "--resume", *more), case.log(run))
            (step,) = re.findall(r"goes on from the checkpoint of step (\d+)", output)
            undisturbed, resumed = _losses(whole), _losses(run)
            found |= {"resumed_from": int(step), "steps": max(undisturbed), "tolerance": 1e-6}
            assert 0 < int(step) < max(undisturbed)
            assert undisturbed.keys() == resumed.keys()
            difference = max(abs(undisturbed[step] - resumed[step]) for step in undisturbed)
            found["largest_loss_difference"] = difference
            assert difference <= 1e-6
    finally:
        case.hosts.mend("b")
    assert case.hosts.left(10) == []


@pytest.mark.exhaustive
def test_sigterm_stops_the_ranks_of_both_hosts(case: Case) -> None:
    """The user's command is asked to stop: all ranks finish their step, and the run can go on."""
    run = case.directory / "stopped"
    processes = case.both(run, "ssh", *_WITHOUT_END, "training.checkpoint_every=null")
    _wait(lambda: (run / "metrics.jsonl").exists() and len(_losses(run)) > 3, processes)
    with figures("sigterm_two_hosts") as found:
        found["limit_seconds"] = 30
        before, asked = max(_losses(run)), time.monotonic()
        processes["a"].terminate()
        output = _ends(processes["a"], case.log(run), 75, 40)
        found["seconds_to_the_end"] = round(time.monotonic() - asked, 1)
        stopped = json.loads((run / "stopped.json").read_text())
        newest = Store.of(run, runs.read_config(run).training.checkpoint).newest()
        newest.verify()
        found |= {"checkpoint": newest.progress.step, "steps_lost": stopped["step"] - newest.progress.step}
        assert stopped["reason"] == "SIGTERM"
        assert stopped["checkpoint"] == stopped["step"] == newest.progress.step > before
        assert f"go on from the checkpoint of step {stopped['step']}" in output
        assert found["seconds_to_the_end"] <= found["limit_seconds"]
    assert case.hosts.left(10) == []


@pytest.mark.exhaustive
def test_nothing_outlives_a_killed_launcher(case: Case) -> None:
    run = case.directory / "killed"
    processes = case.both(run, "ssh", *_WITHOUT_END, _QUICK)
    _wait(lambda: (run / "metrics.jsonl").exists() and len(_losses(run)) > 3, processes)
    processes["a"].kill()
    assert case.hosts.left(_NAMED_SECONDS) == []


class TestRefusedBeforeAnythingStarts:
    def test_a_host_without_sshd(self, case: Case) -> None:
        hostfile = case.directory / "gone"
        hostfile.write_text("host-a slots=1\n10.77.0.1 slots=1\n")
        run = case.directory / "refused"
        output = _ends(case.start("a", run, "--hostfile", hostfile, "--ssh-port", 23), case.log(run), 2, 60)
        assert "gone, line 1: host host-a cannot be reached by ssh" in output
        assert "gone, line 2: host 10.77.0.1 cannot be reached by ssh" in output
        assert "`ssh -p 23 10.77.0.1 true` has to work without a question" in output
        assert len(output.strip().splitlines()) == 1
        assert not run.exists()

    @pytest.mark.exhaustive
    def test_a_rendezvous_where_nobody_is(self, case: Case) -> None:
        run = case.directory / "alone"
        words = ("--nnodes", 2, "--rendezvous", "10.77.0.2:29400", "--start-seconds", 3)
        output = _ends(case.start("a", run, *words), case.log(run), 2, 60)
        assert "no word from the first host at 10.77.0.2:29400 within 3 s" in output

    @pytest.mark.exhaustive
    def test_the_first_host_of_a_rendezvous_alone(self, case: Case) -> None:
        run = case.directory / "first-alone"
        words = ("--nnodes", 2, "--rendezvous", "10.77.0.1:29400", "--start-seconds", 3)
        output = _ends(case.start("a", run, *words), case.log(run), 2, 60)
        assert "1 of 2 came to 10.77.0.1:29400 within 3 s" in output
        assert not run.exists()
