"""Claims about `data_pipeline.storage` on S3: what is retried, what is refused, how long either takes at most."""

import io
import multiprocessing
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipeline import storage
from data_pipeline.errors import GenattError
from data_pipeline.format import MANIFEST
from data_pipeline.s3 import LIMIT_SECONDS
from data_pipeline.storage import check_access, copy, filesystem, opened, publishing, read_bytes, read_ranges

pytestmark = pytest.mark.s3

CONTENT = bytes(range(256)) * 1000


@pytest.fixture
def impatient(monkeypatch):
    """Gives up after 1 s instead of 25, in this process."""
    monkeypatch.setattr("data_pipeline.s3.S3.__init__.__kwdefaults__", {**_defaults(), "retry_seconds": 1.0})


def _defaults():
    from data_pipeline.s3 import S3

    return S3.__init__.__kwdefaults__


def refusal(function, *args, **kwargs) -> str:
    with pytest.raises(GenattError) as caught:
        function(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    assert os.environ.get("AWS_SECRET_ACCESS_KEY", "tests/only+secret") not in message
    return message


def test_limit_is_at_most_a_minute():
    assert LIMIT_SECONDS <= 60


def test_bytes_written_are_bytes_read(s3):
    storage.write_bytes(f"{s3.url}/a/b.bin", CONTENT)
    assert s3.get("a/b.bin") == read_bytes(f"{s3.url}/a/b.bin") == CONTENT
    assert read_bytes(f"s3a://{s3.bucket}/a/b.bin") == CONTENT


def test_ranges_come_in_the_order_asked(s3, faults):
    url = s3.put("log", CONTENT)
    ranges = [(1000, 2000), (0, 0), (5, 6), (len(CONTENT) - 10, len(CONTENT))]
    assert read_ranges(url, ranges) == [CONTENT[start:stop] for start, stop in ranges]
    assert faults.count("GET", key="log") == 3
    assert read_ranges(url, []) == []


def test_ranges_of_a_local_file(tmp_path):
    (tmp_path / "log").write_bytes(CONTENT)
    assert read_ranges(str(tmp_path / "log"), [(7, 9), (3, 3), (0, 4)]) == [CONTENT[7:9], b"", CONTENT[:4]]


def test_opened_seeks_like_a_file(s3, faults):
    with opened(s3.put("log", CONTENT), block_size=1000) as stream:
        stream.seek(-10, os.SEEK_END)
        assert stream.tell() == len(CONTENT) - 10
        assert stream.read() == CONTENT[-10:]
        stream.seek(4096)
        assert stream.read(3) == CONTENT[4096:4099]
        assert stream.read(50_000) == CONTENT[4099:54_099]
    assert faults.count("GET", key="log") <= 5


@pytest.mark.parametrize(("status", "code"), [(503, "SlowDown"), (429, "TooManyRequests"), (500, "InternalError")])
def test_burst_of_refusals_ends_in_success(s3, faults, status, code):
    faults.fail(next_n=3, status=status, code=code)
    storage.write_bytes(f"{s3.url}/log", CONTENT)
    assert faults.failed == 3
    faults.fail(next_n=3, status=status, code=code)
    assert read_bytes(f"{s3.url}/log") == CONTENT
    faults.fail(next_n=2, status=status, code=code, buckets_too=True)
    assert filesystem(s3.url)[0].find(s3.bucket) == [f"{s3.bucket}/log"]
    assert faults.failed == 8


def test_broken_connections_are_tried_again(s3, faults):
    url = s3.put("log", CONTENT)
    faults.refuse(next_n=1)
    faults.cut(next_n=2)
    assert read_bytes(url) == CONTENT
    faults.refuse(next_n=1)
    faults.cut(next_n=2)
    with opened(url) as stream:
        assert stream.read() == CONTENT
    faults.cut(next_n=2)
    assert read_ranges(url, [(0, 1000), (1000, 5000)]) == [CONTENT[:1000], CONTENT[1000:5000]]
    faults.refuse(next_n=2, methods=("PUT",))
    storage.write_bytes(url, CONTENT[::-1])
    assert s3.get("log") == CONTENT[::-1]


@pytest.mark.parametrize("operation", ["read", "ranges", "opened", "write", "list", "copy", "publish"])
def test_permanent_refusal_is_an_error_in_bounded_time(s3, faults, impatient, operation):
    url = s3.put("log", CONTENT)
    faults.fail_always()

    def open_and_read():
        with opened(url) as stream:
            stream.read()

    def list_all():
        with storage.explaining(s3.url, "list"):
            filesystem(s3.url)[0].find(s3.bucket)

    def publish():
        with publishing(f"{s3.url}/out"):
            pass

    start = time.monotonic()
    message = refusal(
        {
            "read": lambda: read_bytes(url),
            "ranges": lambda: read_ranges(url, [(0, 5), (5, 10)]),
            "opened": open_and_read,
            "write": lambda: storage.write_bytes(url, b"new"),
            "list": list_all,
            "copy": lambda: copy(url, f"{url}-2"),
            "publish": publish,
        }[operation]
    )
    assert time.monotonic() - start < 15
    assert s3.bucket in message
    assert s3.endpoint.removeprefix("http://") in message
    assert "(tried for " in message


@pytest.mark.exhaustive
def test_permanent_refusal_keeps_the_documented_limit(s3, faults):
    url = s3.put("log", CONTENT)
    faults.fail_always()
    start = time.monotonic()
    assert "SlowDown" in refusal(storage.write_bytes, url, b"new")
    assert 10 < time.monotonic() - start < LIMIT_SECONDS


def test_missing_file_is_told_apart_at_once(s3, faults):
    with pytest.raises(GenattError, match="no such file") as caught:
        read_bytes(f"{s3.url}/absent")
    assert isinstance(caught.value.__cause__, FileNotFoundError)
    assert faults.count("GET") + faults.count("HEAD") <= 3


def test_vanished_file_is_listed_and_not_read(s3, faults):
    url = s3.put("log/1", CONTENT)
    faults.vanish("log/1", after=1)
    assert read_bytes(url) == CONTENT
    assert "no such file" in refusal(read_bytes, url)
    assert s3.bucket + "/log/1" in filesystem(url)[0].find(f"{s3.bucket}/log")


def test_file_replaced_while_read_is_an_error(s3):
    with opened(s3.put("log", CONTENT), block_size=1000) as stream:
        stream.read(10)
        s3.put("log", CONTENT[::-1])
        stream.seek(100_000)
        assert "log" in refusal(stream.read, 10)


def test_parquet_is_read_through_opened_in_few_requests(s3, faults, impatient):
    table = pa.table({"user": list(range(100_000)), "item": list(range(100_000))})
    sink = io.BytesIO()
    pq.write_table(table, sink, row_group_size=10_000)
    url = s3.put("log.parquet", sink.getvalue())
    with opened(url, block_size=1 << 16) as stream:
        file = pq.ParquetFile(stream)
        assert file.read_row_group(3, columns=["item"])["item"].to_pylist() == list(range(30_000, 40_000))
        assert faults.count("GET", key="log.parquet") <= 4
        faults.fail_always()
        assert "SlowDown" in refusal(file.read_row_group, 8)  # pyarrow passes it on as it is


def test_errors_of_the_reader_pass_through_opened(s3):
    with pytest.raises(ValueError, match="mine"), opened(s3.put("log", CONTENT)):
        raise ValueError("mine")


def test_access_is_granted_quietly(s3, tmp_path):
    check_access(s3.url)
    check_access(f"{s3.url}/log/*.parquet")
    check_access(f"{s3.url}/not/yet/there")
    check_access(str(tmp_path / "absent"))


def test_wrong_credentials_are_named_at_once(s3, monkeypatch):
    check_access(s3.url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAWRONG")
    start = time.monotonic()
    message = refusal(check_access, f"{s3.url}/log")
    assert time.monotonic() - start < 15
    assert "credentials refused" in message
    assert "AWS_ACCESS_KEY_ID" in message
    assert s3.endpoint.removeprefix("http://") in message
    assert "credentials refused" in refusal(storage.write_bytes, f"{s3.url}/log", b"")


def test_wrong_bucket_is_named(s3):
    message = refusal(check_access, "s3://no-such-bucket-here/log")
    assert "no bucket 'no-such-bucket-here'" in message
    assert "no bucket 'no-such-bucket-here'" in refusal(storage.write_bytes, "s3://no-such-bucket-here/log", b"")
    assert "names no bucket" in refusal(check_access, "s3://")


def test_denied_bucket_is_named(s3, faults):
    faults.fail_always(status=403, code="AccessDenied")
    message = refusal(check_access, f"{s3.url}/log")
    assert f"access to bucket '{s3.bucket}' denied" in message


def test_right_to_read_without_right_to_list_is_enough_for_a_file(s3, faults):
    url = s3.put("log", CONTENT)
    faults.fail(next_n=1, status=403, code="AccessDenied", methods=("GET",), buckets_too=True)
    check_access(url)


@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:9", "localhost:9", "http://user:tests-password@127.0.0.1:9"])
def test_unreachable_endpoint_is_named(s3, monkeypatch, endpoint):
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    message = refusal(check_access, s3.url, timeout=10)
    assert "AWS_ENDPOINT_URL" in message
    assert ":9" in message
    assert "tests-password" not in message


def test_silent_endpoint_is_given_up(s3, faults):
    faults.silent()
    start = time.monotonic()
    message = refusal(check_access, s3.url, timeout=1)
    assert time.monotonic() - start < 15
    assert s3.endpoint.removeprefix("http://") in message
    assert "in 1 s" in message


def test_without_credentials_nothing_stalls(s3, tmp_path):
    """In a process of its own, with the instance's metadata at an address that never answers."""
    with socket.socket() as never:
        never.bind(("127.0.0.1", 0))
        never.listen()
        environment = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")} | {
            "AWS_ENDPOINT_URL": s3.endpoint,
            "AWS_EC2_METADATA_SERVICE_ENDPOINT": f"http://127.0.0.1:{never.getsockname()[1]}",
            "HOME": str(tmp_path),
        }
        program = f"from data_pipeline.storage import check_access; check_access({s3.url!r})"
        start = time.monotonic()
        ran = subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=30
        )
    assert time.monotonic() - start < 15
    last = ran.stderr.strip().splitlines()[-1]
    assert "no credentials" in last
    assert "AWS_ACCESS_KEY_ID" in last


def test_credentials_in_the_path_are_refused(s3):
    for path in ("s3://key:tests-password@bucket/log", "s3://key:tests/password@bucket/log"):
        message = refusal(filesystem, path)
        assert "AWS_SECRET_ACCESS_KEY" in message
        assert "password" not in message


@pytest.mark.parametrize(
    ("url", "extra"), [("gs://b/x", "gcs"), ("gcs://b/x", "gcs"), ("abfs://b/x", "azure"), ("az://b/x", "azure")]
)
def test_missing_extra_is_named(url, extra, monkeypatch):
    for module in ("gcsfs", "adlfs"):
        monkeypatch.setitem(sys.modules, module, None)
    assert refusal(filesystem, url).endswith(f"pip install 'genatt-dist[{extra}]'")


def test_file_urls_and_plain_paths_are_local(tmp_path):
    (tmp_path / "log").write_bytes(b"1")
    assert read_bytes(f"file://{tmp_path}/log") == read_bytes(str(tmp_path / "log")) == b"1"


def test_file_system_works_after_a_fork_and_in_other_processes(s3):
    url = s3.put("log", CONTENT)
    assert read_bytes(url) == CONTENT  # the parent's event loop runs
    for method in ("fork", "spawn"):
        with multiprocessing.get_context(method).Pool(2) as pool:
            assert pool.map(read_bytes, [url] * 4, chunksize=1) == [CONTENT] * 4


def test_file_system_survives_pickling(s3):
    fs, inner = filesystem(s3.put("log", CONTENT))
    assert pickle.loads(pickle.dumps(fs)).cat_file(inner) == CONTENT
    assert b"tests/only+secret" not in pickle.dumps(fs)


def test_many_threads_share_one_burst(s3, faults):
    url = s3.put("log", CONTENT)
    faults.fail(next_n=20)
    read: list[bytes] = []
    threads = [threading.Thread(target=lambda: read.append(read_bytes(url))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert read == [CONTENT] * 8


def test_copy_inside_a_store_moves_no_bytes_through_here(s3, faults):
    url = s3.put("a", CONTENT)
    copy(url, f"{s3.url}/b/c")
    assert s3.get("b/c") == CONTENT
    assert faults.count("GET", key="a") == 0


def test_copy_between_stores_and_locally(s3, tmp_path):
    url = s3.put("a", CONTENT)
    copy(url, str(tmp_path / "new" / "a"))
    copy(str(tmp_path / "new" / "a"), str(tmp_path / "newer" / "a"))
    copy(str(tmp_path / "newer" / "a"), f"{s3.url}/back")
    assert s3.get("back") == CONTENT
    assert "no such file" in refusal(copy, f"{s3.url}/absent", f"{s3.url}/x")
    assert "absent" in refusal(copy, str(tmp_path / "absent"), str(tmp_path / "x"))


def publish(out: str, fail: type[BaseException] | None = None) -> None:
    with publishing(out) as directory:
        for number in range(3):
            storage.write_bytes(f"{directory}/shards/{number}", b"rows")
        if fail is KeyboardInterrupt:
            storage.write_bytes(f"{directory}/{MANIFEST}", b"{}")
        if fail:
            raise fail
        storage.write_bytes(f"{directory}/{MANIFEST}", b"{}")


def test_published_directory_holds_what_was_written_and_no_marker(s3):
    publish(f"{s3.url}/out/")
    assert s3.names() == [f"out/{MANIFEST}", "out/shards/0", "out/shards/1", "out/shards/2"]


@pytest.mark.parametrize("fail", [ValueError, KeyboardInterrupt])
def test_failed_publication_leaves_nothing(s3, fail):
    s3.put("out-2/log", b"")
    with pytest.raises(fail):
        publish(f"{s3.url}/out", fail)
    assert s3.names() == ["out-2/log"]


def test_manifest_goes_first_when_a_publication_is_discarded(s3, faults, impatient):
    """Whatever fails after it: what is left must not look complete."""

    def interrupted() -> None:
        with publishing(f"{s3.url}/out") as directory:
            storage.write_bytes(f"{directory}/0", b"")
            storage.write_bytes(f"{directory}/{MANIFEST}", b"")
            faults.fail_always(methods=("GET",))  # no listing: nothing else can be found
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert "out/0" in s3.names()
    assert f"out/{MANIFEST}" not in s3.names()


def test_complete_is_the_manifest():
    assert storage.COMPLETE == MANIFEST


@pytest.mark.parametrize("there", [f"out/{MANIFEST}", "out/half/written", "out"])
def test_prefix_with_anything_in_it_is_refused_and_untouched(s3, there):
    s3.put(there, b"kept")
    assert "exists already" in refusal(publish, f"{s3.url}/out")
    assert s3.names() == [there]
    assert s3.get(there) == b"kept"


def test_sibling_with_the_same_beginning_is_no_obstacle(s3):
    s3.put("out-old/log", b"")
    publish(f"{s3.url}/out")
    assert f"out/{MANIFEST}" in s3.names()


def test_second_preparation_is_refused_while_one_writes(s3):
    with publishing(f"{s3.url}/out"):
        assert "another preparation" in refusal(publish, f"{s3.url}/out")
    assert s3.names() == []


@pytest.mark.parametrize("remote", [True, False])
def test_of_many_preparations_at_once_none_mixes(s3, tmp_path, remote):
    out = f"{s3.url}/out" if remote else str(tmp_path / "out")
    barrier = threading.Barrier(6)
    finished: list[int] = []

    def prepare(number: int) -> None:
        barrier.wait()
        try:
            with publishing(out) as directory:
                for part in range(3):
                    storage.write_bytes(f"{directory}/{part}", b"%d" % number)
                storage.write_bytes(f"{directory}/{MANIFEST}", b"%d" % number)
        except GenattError:
            return
        finished.append(number)

    threads = [threading.Thread(target=prepare, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(finished) <= 1 if remote else len(finished) == 1
    names = ["0", "1", "2", MANIFEST]
    if remote:
        assert s3.names() == ([f"out/{name}" for name in names] if finished else [])
    else:
        assert os.listdir(tmp_path) == ["out"]
    for number in finished:
        assert {read_bytes(f"{out}/{name}") for name in names} == {b"%d" % number}


def test_killed_preparation_is_not_readable_and_named(s3):
    program = (
        "from data_pipeline import storage; import time\n"
        f"with storage.publishing({s3.url + '/out'!r}) as out:\n"
        "    storage.write_bytes(out + '/shards/0', b'rows'); print('there', flush=True); time.sleep(60)"
    )
    for how, left in ((signal.SIGINT, 0), (signal.SIGKILL, 2)):
        with subprocess.Popen(
            [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        ) as child:
            assert child.stdout is not None
            assert child.stdout.readline() == b"there\n"
            child.send_signal(how)
            assert child.wait(timeout=20) != 0
        assert len(s3.names()) == left
        assert f"out/{MANIFEST}" not in s3.names()
    assert "was killed" in refusal(publish, f"{s3.url}/out")


def test_interrupted_write_of_the_manifest_does_not_end_after_the_cleanup(s3, faults):
    program = (
        "from data_pipeline import storage\n"
        f"with storage.publishing({s3.url + '/out'!r}) as out:\n"
        f"    storage.write_bytes(out + '/shards/0', b'rows'); storage.write_bytes(out + '/{MANIFEST}', b'{{}}')"
    )
    faults.slow(1.0, key=f"out/{MANIFEST}")
    with subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE) as child:
        while not faults.count("PUT", key=f"out/{MANIFEST}"):
            time.sleep(0.01)
        child.send_signal(signal.SIGINT)
        assert child.stderr is not None
        assert b"KeyboardInterrupt" in child.stderr.read()
    time.sleep(1)
    assert s3.names() == []


def test_local_publication_appears_whole_or_not_at_all(tmp_path: Path):
    with pytest.raises(KeyboardInterrupt):
        publish(str(tmp_path / "out"), KeyboardInterrupt)
    assert os.listdir(tmp_path) == []
    publish(str(tmp_path / "out"))
    assert sorted(os.listdir(tmp_path / "out")) == [MANIFEST, "shards"]
    assert "exists already" in refusal(publish, str(tmp_path / "out"))
