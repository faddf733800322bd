"""A local S3 with faults on demand: moto in a process of its own, and a proxy in front of it.

Everything under test talks to the proxy, as does every process started after the fixture `s3`, Ray's included, for the
environment says so. Buckets are made, and files looked at, behind the proxy: that is neither counted nor disturbed.
"""

import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import boto3
import pytest
from fault_proxy import Faults, serve

KEY_ID, SECRET = "AKIATESTSONLY", "tests/only+secret"  # the proxy refuses every other key id


@dataclass(frozen=True)
class Store:
    """A fresh bucket.

    url           s3://BUCKET
    endpoint      the proxy: what AWS_ENDPOINT_URL says
    undisturbed   moto itself, for what must be fast or is not under test
    environment   all that a process needs to reach the proxy (Ray: `runtime_env={"env_vars": s3.environment}`)
    client        a boto3 client that goes to moto itself
    """

    bucket: str
    endpoint: str
    undisturbed: str
    environment: dict[str, str]
    client: Any = field(repr=False)

    @property
    def url(self) -> str:
        return f"s3://{self.bucket}"

    def put(self, key: str, content: bytes) -> str:
        """Stores an object and returns its URL."""
        self.client.put_object(Bucket=self.bucket, Key=key, Body=content)
        return f"{self.url}/{key}"

    def get(self, key: str) -> bytes:
        return self.client.get_object(Bucket=self.bucket, Key=key)["Body"].read()

    def names(self, prefix: str = "") -> list[str]:
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=prefix)
        return [found["Key"] for page in pages for found in page.get("Contents", [])]

    def truncate(self, key: str, keep: float = 0.5) -> None:
        """Cuts the end off a stored object: it is shorter from now on, in listings too."""
        content = self.get(key)
        self.put(key, content[: int(len(content) * keep)])


@dataclass(frozen=True)
class _Server:
    endpoint: str
    undisturbed: str
    faults: Faults
    client: Any


@pytest.fixture(scope="session")
def s3_server() -> Iterator[_Server]:
    """Moto and the proxy, for the session."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    moto = subprocess.Popen(command, env=clean, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 30
        while not _answers(port):
            assert moto.poll() is None, "moto has ended"
            assert time.monotonic() < deadline, "moto does not start"
            time.sleep(0.02)
        client = boto3.client(
            "s3",
            endpoint_url=f"http://127.0.0.1:{port}",
            aws_access_key_id=KEY_ID,
            aws_secret_access_key=SECRET,
            region_name="us-east-1",
        )
        with serve(port, KEY_ID) as (endpoint, faults):
            yield _Server(endpoint, f"http://127.0.0.1:{port}", faults, client)
    finally:
        moto.kill()
        moto.wait()


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture
def s3(s3_server: _Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Iterator[Store]:
    """A fresh bucket, and an environment that leads to it. See `Store`."""
    environment = {
        "AWS_ENDPOINT_URL": s3_server.endpoint,
        "AWS_ACCESS_KEY_ID": KEY_ID,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": str(tmp_path / "no-config"),
        "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "no-credentials"),
    }
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    bucket = f"test-{secrets.token_hex(6)}"
    s3_server.client.create_bucket(Bucket=bucket)
    s3_server.faults.reset()
    yield Store(bucket, s3_server.endpoint, s3_server.undisturbed, environment, s3_server.client)
    s3_server.faults.reset()


@pytest.fixture
def faults(s3: Store, s3_server: _Server) -> Faults:
    """What goes wrong between the test and `s3`; nothing until asked for, and nothing after the test.

    faults.fail(next_n=5)                           the next five requests of objects get 503 SlowDown
    faults.fail(next_n=2, status=429, code="TooManyRequests", methods=("PUT",), key="out/*")
    faults.fail_always()                            every request, until `faults.reset()`
    faults.vanish("log/part-1.parquet", after=1)    one read succeeds, then there is no such object (still listed)
    faults.cut(next_n=1, key="*.parquet")           the connection breaks in the middle of the body
    faults.refuse(next_n=1)                         the connection breaks before an answer
    faults.slow(0.05)                               each request of an object waits before it is served
    faults.silent()                                 requests are accepted and never answered
    faults.count("GET", key="log/*")                requests so far, failed ones included
    faults.failed                                   how many of all were disturbed
    s3.truncate("log/part-1.parquet")               a shorter object from now on

    All may be called while other threads and processes are at it. Keys are patterns of `fnmatch`.
    """
    return s3_server.faults
