"""A job is submitted once for its run, ends with the right exit code, and secrets are shown nowhere."""

from __future__ import annotations

import socket
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from ray.job_submission import JobDetails, JobStatus, JobType

from data_pipeline.errors import GenattError, ResumableError
from genatt_dist.cli import main
from jobs import client as api
from jobs import packaging, submit

RUN = "s3://bucket/runs/Some Run"


class Cluster:
    """The Jobs API, as much as is used of it. log: what each connection for it gives, or how it fails."""

    def __init__(self) -> None:
        self.jobs: dict[str, dict[str, Any]] = {}
        self.submitted: list[dict[str, Any]] = []
        self.logs: list[str | Exception] = []
        self.statuses: list[str | Exception] = []
        self.refuse: Exception | None = None

    def list_jobs(self) -> list[JobDetails]:
        return [self.get_job_info(name) for name in self.jobs]

    def get_job_info(self, job_id: str) -> JobDetails:
        status = self.statuses.pop(0) if self.statuses else None
        if isinstance(status, Exception):
            raise status
        if job_id not in self.jobs:
            raise RuntimeError(f"Request failed with status code 404: Job {job_id} does not exist.")
        if status:
            self.jobs[job_id]["status"] = status
        return JobDetails(type=JobType.SUBMISSION, submission_id=job_id, entrypoint="-", **self.jobs[job_id])

    def submit_job(self, *, submission_id: str, metadata: dict[str, str], **rest: Any) -> str:
        directory = Path(rest["runtime_env"]["working_dir"])
        self.submitted.append({"document": (directory / "job.yaml").read_text(), "metadata": metadata, **rest})
        if self.refuse:
            raise self.refuse
        self.jobs[submission_id] = {"status": "PENDING", "metadata": metadata}
        return submission_id

    def stop_job(self, job_id: str) -> bool:
        self.jobs[job_id]["status"] = "STOPPED"
        return True

    def get_job_logs(self, job_id: str) -> str:
        return "".join(piece for piece in self.logs if isinstance(piece, str))

    async def tail_job_logs(self, job_id: str) -> AsyncIterator[str]:
        for piece in self.logs:
            if isinstance(piece, Exception):
                self.logs.remove(piece)
                raise piece
            yield piece


@pytest.fixture
def cluster() -> Cluster:
    return Cluster()


@pytest.fixture
def package(tmp_path: Path) -> packaging.Package:
    (tmp_path / "a.py").touch()
    return packaging.survey(tmp_path)


@pytest.fixture
def job(tmp_path: Path) -> Callable[..., submit.Job]:
    config = tmp_path / "run.yaml"
    config.write_text("data: {path: s3://bucket/shards}")

    def make(kind: str = "train", *overrides: str, **options: Any) -> submit.Job:
        return submit.job_of(kind, config if kind == "train" else None, overrides, RUN, **options)

    return make


def sent(cluster: Any, job: submit.Job, package: packaging.Package) -> submit.Submitted:
    return submit.submit(cluster, job, package, lambda line: None)


def test_one_job_a_run_at_a_time_and_another_attempt_after_it(
    cluster: Any, job: Callable[..., submit.Job], package: packaging.Package
) -> None:
    first = sent(cluster, job(), package)
    assert first.id.startswith("genatt-train-some-run-")
    assert first.id.endswith("-1")
    assert not first.attached
    assert sent(cluster, job(), package) == submit.Submitted(first.id, attached=True)
    cluster.jobs[first.id]["status"] = "RUNNING"
    assert sent(cluster, job(), package).attached
    with pytest.raises(GenattError, match=f"has job {first.id} at work with another configuration"):
        sent(cluster, job("train", "world_size=2"), package)
    with pytest.raises(GenattError, match=rf"has job {first.id} at work: wait .* `genatt jobs stop {first.id} --wait`"):
        sent(cluster, job("evaluate"), package)
    cluster.jobs[first.id]["status"] = "FAILED"
    second = sent(cluster, job("train", "world_size=2"), package)
    assert second == submit.Submitted(f"{first.id[:-1]}2", attached=False)
    assert len(cluster.submitted) == 2


def test_of_two_submissions_at_once_the_second_follows_the_first(
    cluster: Any, job: Callable[..., submit.Job], package: packaging.Package
) -> None:
    wanted = job()
    name = f"{wanted.name}-1"

    def submit_job(**rest: Any) -> str:
        cluster.jobs[name] = {"status": "PENDING", "metadata": wanted.metadata}
        raise RuntimeError("submission_id already exists")

    cluster.submit_job = submit_job
    assert sent(cluster, wanted, package) == submit.Submitted(name, attached=True)
    del cluster.jobs[name]
    with pytest.raises(GenattError, match=f"has job {name} at work with another configuration"):
        sent(cluster, job("train", "world_size=2"), package)
    del cluster.jobs[name]
    cluster.submit_job = Cluster.submit_job.__get__(cluster)
    cluster.refuse = RuntimeError("disk is\nfull")
    with pytest.raises(GenattError, match=f"^cannot submit job {name}: disk is full$"):
        sent(cluster, wanted, package)


def test_of_two_kinds_at_once_the_later_gives_way(
    cluster: Any, job: Callable[..., submit.Job], package: packaging.Package
) -> None:
    evaluation, training = job("evaluate"), job()
    name = f"{evaluation.name}-1"

    def submit_job(start_time: int, **rest: Any) -> str:
        cluster.jobs[name] = {"status": "RUNNING", "metadata": evaluation.metadata, "start_time": 1000}
        job_id = Cluster.submit_job(cluster, **rest)
        cluster.jobs[job_id]["start_time"] = start_time
        return job_id

    cluster.submit_job = partial(submit_job, 1001)
    with pytest.raises(GenattError, match=f"has job {name} at work: wait for its end"):
        sent(cluster, training, package)
    assert cluster.jobs[f"{training.name}-1"]["status"] == "STOPPED"
    assert cluster.jobs.pop(name)["status"] == "RUNNING"
    cluster.submit_job = partial(submit_job, 999)
    first = sent(cluster, training, package)
    assert cluster.jobs[first.id]["status"] == "PENDING"


def test_secrets_are_in_the_environment_alone(
    cluster: Any, job: Callable[..., submit.Job], package: packaging.Package, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", "sesame")
    wanted = job("train", "training.stop_seconds=70", variables=["MY_KEY"])
    sent(cluster, wanted, package)
    told = cluster.submitted[0]
    variables = told["runtime_env"].pop("env_vars")
    assert variables == {"MY_KEY": "sesame", "RAY_JOB_STOP_WAIT_TIME_S": "100"}
    assert told["entrypoint"] == "exec python -m jobs.train"
    assert "sesame" not in str(told)
    assert "sesame" not in repr(wanted)
    with pytest.raises(GenattError, match="--env OTHER: no such variable"):
        job(variables=["OTHER"])
    with pytest.raises(GenattError, match="takes the name of a variable alone") as refused:
        job(variables=["MY_KEY=sesame"])
    assert "sesame" not in str(refused.value)


def followed(cluster: Any, seconds: float | None = None) -> tuple[JobDetails | None, str, list[str]]:
    text: list[str] = []
    statuses: list[str] = []
    cluster.jobs["a"] = {"status": "RUNNING"}
    return api.follow(cluster, "a", text.append, statuses.append, seconds), "".join(text), statuses


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "POLL_SECONDS", 0.01)


def test_the_log_is_whole_though_connections_break(cluster: Cluster, fast: None) -> None:
    cluster.logs = ["one\n", "two\n", RuntimeError("broken"), "three\n", ConnectionError("again"), "four\n"]
    cluster.statuses = ["PENDING", "RUNNING", RuntimeError("a hiccup"), *["RUNNING"] * 30, "SUCCEEDED"]
    found, text, statuses = followed(cluster)
    assert text == "one\ntwo\nthree\nfour\n"
    assert found is not None
    assert (statuses[0], statuses[-1]) == ("PENDING", "SUCCEEDED")


def test_a_cluster_that_is_gone_is_given_up(cluster: Cluster, fast: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "LOST_SECONDS", 0.1)
    cluster.statuses = ["RUNNING", *[ConnectionError("refused")] * 1000]
    with pytest.raises(ResumableError, match=r"has not answered for .* submit it again when the cluster is back"):
        followed(cluster)


def test_following_ends_after_its_time(cluster: Cluster, fast: None) -> None:
    assert followed(cluster, seconds=0.05)[0] is None


@pytest.mark.parametrize(
    ("end", "code", "message"),
    [
        ({"status": "FAILED", "driver_exit_code": 75}, 75, "job a was stopped and can go on: genatt submit x"),
        ({"status": "STOPPED"}, 75, "job a was stopped and can go on: genatt submit x"),
        ({"status": "FAILED", "error_type": "JOB_SUPERVISOR_ACTOR_DIED"}, 75, "job a lost its node and can go on"),
        ({"status": "FAILED", "driver_exit_code": 2}, 1, "job a failed with exit code 2; its messages are above"),
        ({"status": "FAILED", "message": "no\nroom"}, 1, "job a failed before it ran: no room"),
    ],
)
def test_a_jobs_end_is_an_exit_code(end: dict[str, Any], code: int, message: str) -> None:
    job = JobDetails(type=JobType.SUBMISSION, submission_id="a", entrypoint="-", **end)
    with pytest.raises(GenattError) as raised:
        api.check_ended(job, "genatt submit x")
    assert raised.value.exit_code == code
    assert message in str(raised.value)
    api.check_ended(job.model_copy(update={"status": JobStatus.SUCCEEDED}), "")


@contextmanager
def server(answer: bytes | None) -> Iterator[str]:
    """An address where this answers every request, or nobody does."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            while True:
                try:
                    connection, _ = listening.accept()
                except OSError:
                    return
                if answer is None:
                    time.sleep(60)
                connection.recv(4096)
                connection.sendall(answer or b"")
                connection.close()

        threading.Thread(target=serve, daemon=True).start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


def refusal(*words: object, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    monkeypatch.setattr(sys, "argv", ["genatt", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        main()
    error = capsys.readouterr().err
    assert ended.value.code == 2
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (None, "no Ray cluster answers at --address"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello", "no Ray cluster answers at --address"),
        (b"HTTP/1.1 401 Unauthorized\r\nContent-Length: 2\r\n\r\nno", "asks for a token, or refuses this one"),
    ],
)
def test_an_address_where_no_cluster_answers_is_one_line(
    answer: bytes | None, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(api, "FIRST_ANSWER_SECONDS", 0.3)
    monkeypatch.setattr(api.Client, "answer_seconds", 0.3)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")  # an address that was typed is the one
    with server(answer) as address:
        assert message in refusal("jobs", "list", "--address", address, monkeypatch=monkeypatch, capsys=capsys)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train"], "--run is missing: name a directory or URL for job train"),
        (["prepare"], "--out is missing"),
        (["train", "--out", "x"], "--out x: it is the place of job prepare"),
        (["tran", "--run", "x"], "job tran is unknown: use prepare, train, evaluate, benchmark, pipeline"),
        (["train", "--run", "x"], "job train needs a CONFIG"),
        (["train", "nowhere.yaml", "--run", "x"], "cannot read config nowhere.yaml"),
        (["evaluate", "--run", "x", "--address", "ray://h:1"], "--address ray://h:1 is no HTTP address"),
    ],
)
def test_a_submission_that_cannot_be_is_one_line(
    words: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refusal("submit", *words, monkeypatch=monkeypatch, capsys=capsys)


def test_ctrl_c_leaves_the_job_at_work(
    cluster: Any, fast: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster.jobs["a"] = {"status": "RUNNING"}
    monkeypatch.setattr(api, "connect", lambda address: cluster)

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(api, "follow", interrupted)
    monkeypatch.setattr(
        sys, "argv", ["genatt", "jobs", "logs", "a", "--follow", "--address", "http://me:sesame@head:1"]
    )
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 130
    said = capsys.readouterr().err
    assert said.startswith("a goes on. Follow it: genatt jobs logs a --follow --address http://")
    assert "stop it: genatt jobs stop a" in said
    assert said.count("\n") == 1
    assert "sesame" not in said
    assert cluster.jobs["a"]["status"] == "RUNNING"
