"""What is said of hosts, before anything is started on them."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from data_pipeline.errors import GenattError
from genatt_dist.launch import environment as environment_of_ranks
from genatt_dist.launch import launchers, slurm
from genatt_dist.launch.environment import between_hosts, travelling
from genatt_dist.launch.hosts import Hosts, endpoint, read_hostfile
from genatt_dist.launch.meeting import Meeting, check_seen, mark
from genatt_dist.launch.network import ELSEWHERE, free_port, interface_towards, is_own
from genatt_dist.launch.places import Place
from genatt_dist.launch.rank import place as place_of_rank
from genatt_dist.training.options import TrainingConfig


class TestHostfile:
    @pytest.fixture
    def write(self, tmp_path: Path) -> Callable[[str], Path]:
        def write(text: str) -> Path:
            (tmp_path / "hosts").write_text(text)
            return tmp_path / "hosts"

        return write

    def test_names_slots_and_comments(self, write: Callable[[str], Path]) -> None:
        hosts = read_hostfile(write("# two\n\nnode-1 slots=2\n  node-2   slots=1 # old\n"), 3)
        assert [(host.name, host.slots, host.line) for host in hosts] == [("node-1", 2, 3), ("node-2", 1, 4)]

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("a\n", r"line 1: 'a' is not of the form `name slots=N`"),
            ("a slots=x\n", "line 1: 'a slots=x' is not of the form"),
            ("a slots=0\n", "N at least 1"),
            ("-oProxyCommand=x slots=1\n", "is not of the form"),
            ("a slots=1\na slots=1\n", r"line 2: a is there twice \(line 1\)"),
            ("# none\n", "names no host"),
            ("a slots=1\nb slots=2\n", r"3 slots \(a 1, b 2\), but world_size=2: set world_size=3"),
            ("localhost slots=1\nb slots=1\n", "names localhost first: the other hosts cannot reach it"),
        ],
    )
    def test_what_is_refused(self, write: Callable[[str], Path], text: str, message: str) -> None:
        with pytest.raises(GenattError, match=message):
            read_hostfile(write(text), 2)

    def test_a_missing_file(self, tmp_path: Path) -> None:
        with pytest.raises(GenattError, match=r"--hostfile=.*gone: No such file or directory"):
            read_hostfile(tmp_path / "gone", 2)


@pytest.mark.parametrize(
    ("hosts", "launcher", "message"),
    [
        (Hosts(hostfile=Path("h")), "torchrun", "--hostfile with launcher=torchrun: use --launcher deepspeed"),
        (Hosts(shell="pdsh"), "deepspeed", "without --hostfile"),
        (Hosts(hostfile=Path("h"), shell="slurm"), "deepspeed", "srun genatt train --launcher slurm"),
        (Hosts(nodes=2, rendezvous="a:1"), "deepspeed", "use --launcher torchrun"),
        (Hosts(nodes=2), "torchrun", "--nnodes=2 without --rendezvous"),
        (Hosts(nodes=2, rendezvous="a"), "torchrun", "--rendezvous=a is not HOST:PORT"),
        (Hosts(nodes=3, rendezvous="a:1"), "torchrun", "world_size=4 over --nnodes=3"),
        (Hosts(nodes=2, rendezvous="a:1", node_rank=2), "torchrun", "--node-rank=2 with --nnodes=2: use 0 to 1"),
    ],
)
def test_words_that_do_not_go_together(hosts: Hosts, launcher: str, message: str) -> None:
    with pytest.raises(GenattError, match=message):
        hosts.check(launcher, 4)


def test_endpoints() -> None:
    assert endpoint("node-1:29400") == ("node-1", 29400)
    assert endpoint("[fe80::1]:1") == ("fe80::1", 1)


class TestSlurm:
    _TASK = {  # noqa: RUF012
        "SLURM_PROCID": "5",
        "SLURM_NTASKS": "7",
        "SLURM_LOCALID": "1",
        "SLURM_NODEID": "2",
        "SLURM_NODELIST": "gpu[03-05,9]",
        "SLURM_STEP_TASKS_PER_NODE": "2(x3),1",
    }

    def test_a_task_knows_its_place(self) -> None:
        expected = {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "7", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "gpu03"}
        assert slurm.task(self._TASK, 7) == expected

    def test_a_gpu_that_is_bound_to_the_task_is_its_first(self) -> None:
        assert slurm.task(self._TASK | {"CUDA_VISIBLE_DEVICES": "3"}, 7)["LOCAL_RANK"] == "0"
        assert slurm.task(self._TASK | {"CUDA_VISIBLE_DEVICES": "0,1"}, 7)["LOCAL_RANK"] == "1"

    def test_another_number_of_tasks(self) -> None:
        with pytest.raises(GenattError, match=r"SLURM_NTASKS=7, but world_size=8: use `srun --ntasks=8`"):
            slurm.task(self._TASK, 8)

    def test_outside_slurm(self) -> None:
        with pytest.raises(GenattError, match="launcher=slurm outside a Slurm task"):
            slurm.task({}, 1)

    @pytest.mark.parametrize(
        ("nodes", "first"), [("a", "a"), ("a,b", "a"), ("n[1-2],x", "n1"), ("r[1-2]n[07,9]-ib", "r1n07-ib")]
    )
    def test_the_first_node_of_a_list(self, nodes: str, first: str) -> None:
        assert slurm.first_host(nodes) == first


def test_secrets_travel_apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    (tmp_path / ".deepspeed_env").write_text("# of the user\n\nNCCL_DEBUG=INFO\n")
    base = {"AWS_SECRET_ACCESS_KEY": "x", "AWS_REGION": "y", "OMP_NUM_THREADS": "1", "HOME": "/h", "RANK": "0"}
    seen, secret = travelling(base | {"GENATT_LAUNCHER_PID": "1", "CUDA_VISIBLE_DEVICES": "0"})
    assert secret == {"AWS_SECRET_ACCESS_KEY": "x"}
    assert seen == {"AWS_REGION": "y", "OMP_NUM_THREADS": "1", "NCCL_DEBUG": "INFO"}
    (tmp_path / ".deepspeed_env").write_text("NCCL_DEBUG\n")
    with pytest.raises(GenattError, match=r"\.deepspeed_env, line 1: not of the form KEY=VALUE"):
        travelling({})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("AZURE_STORAGE_CONNECTION_STRING", "AccountName=a;AccountKey=x"),
        ("FSSPEC_S3", '{"key": "a", "secret": "b"}'),
        ("HTTPS_PROXY", "http://me:word@proxy:3128"),
        ("MLFLOW_TRACKING_URI", "https://me:word@mlflow"),
    ],
)
def test_a_secret_is_known_by_its_value_too(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    assert travelling({name: value}) == ({}, {name: value})


def test_no_secret_is_left_where_deepspeed_puts_it_on_a_command_line(tmp_path: Path) -> None:
    place = Place(Hosts(tmp_path / "hosts", "pdsh"), 1, "cpu", master="10.0.0.1", port=1)
    environment = {"MLFLOW_TRACKING_PASSWORD": "hush", "AWS_SECRET_ACCESS_KEY": "hush", "PATH": "/bin"}
    start = launchers.Start(place, ["run"], environment, TrainingConfig(), tmp_path)
    command = launchers._over_shell(start)
    assert "hush" not in " ".join(command) + (tmp_path / "environment").read_text()
    assert "MLFLOW_TRACKING_PASSWORD" not in start.environment  # it exports what begins with MLFLOW
    assert start.environment["AWS_SECRET_ACCESS_KEY"] == "hush"  # and this not


@pytest.mark.parametrize(("master", "interface"), [("first", "eth7"), ("localhost", None), ("127.0.0.1", None)])
def test_the_first_host_whose_name_is_its_loopback_is_reached_by_the_others(
    master: str, interface: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment_of_ranks, "interface_towards", {ELSEWHERE: "eth7"}.get)
    assert between_hosts({}, master).get("GLOO_SOCKET_IFNAME") == interface


@pytest.mark.parametrize(
    "words",
    [
        ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
        ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
        ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE"),
    ],
)
def test_the_words_of_every_launcher(words: tuple[str, ...]) -> None:
    given = dict(zip(words, "3412", strict=True))
    expected = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    assert place_of_rank({"WORLD_SIZE": "4"} | given) == expected
    with pytest.raises(GenattError, match="no launcher's variables"):
        place_of_rank({"RANK": "0"})


def test_the_loopback_is_no_way_to_other_hosts() -> None:
    assert is_own("127.0.0.1")
    assert not is_own("no-such-host.invalid")
    assert interface_towards("127.0.0.1") is None


class TestMeeting:
    def _together(self, run: Path, first: Callable[[Meeting], object]) -> list[object]:
        """What the second of two hears when the first does `first`."""
        port, heard = free_port(), []

        def second() -> None:
            try:
                heard.append(Meeting("127.0.0.1", port, False, 2, None, 20).hear(run, "second"))
            except GenattError as error:
                heard.append(str(error))

        thread = threading.Thread(target=second)
        thread.start()
        meeting = Meeting("127.0.0.1", port, True, 2, None, 20)
        first(meeting)
        thread.join(20)
        return heard

    def test_the_others_hear_where_the_first_rank_is(self, tmp_path: Path) -> None:
        assert self._together(tmp_path, lambda meeting: meeting.announce(tmp_path, 4711)) == [4711]

    def test_the_others_hear_why_there_is_no_run(self, tmp_path: Path) -> None:
        started = time.monotonic()
        heard = self._together(tmp_path, lambda meeting: meeting.refuse("run directory r exists"))
        assert heard == ["the first host could not start: run directory r exists"]
        assert time.monotonic() - started < 10

    def test_a_port_in_use(self) -> None:
        with socket.create_server(("", 0)) as other, pytest.raises(GenattError, match="is in use here"):
            Meeting("127.0.0.1", other.getsockname()[1], True, 1, None, 5)

    def test_a_run_directory_of_another_file_system(self, tmp_path: Path) -> None:
        token = mark(tmp_path)
        check_seen(tmp_path, token, "b", 1)
        with pytest.raises(GenattError, match=r"host b does not see in run directory .* a file system that all hosts"):
            check_seen(tmp_path / "other", token, "b", 0.1)
