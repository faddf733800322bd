"""moto's S3 server on 127.0.0.1 in a process of its own, which counts requests and the bytes of its answers.

python -m benchmarks.ingest.server PORT
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable
from typing import Any

import psutil

SERVED_PATH = "/served-so-far"  # outside every bucket
START_SECONDS = 60.0
STOP_SECONDS = 10.0


class S3Server:
    """Runs for the time of the block. `environment` is what a client needs to reach it.

    `RuntimeError` with the end of what it said when it does not start.
    """

    def __enter__(self) -> S3Server:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.url = f"http://127.0.0.1:{free.getsockname()[1]}"
        self._said = tempfile.TemporaryFile()
        command = [sys.executable, "-m", "benchmarks.ingest.server", self.url.rpartition(":")[2]]
        self._process = subprocess.Popen(command, stdout=self._said, stderr=self._said)
        began = time.monotonic()
        try:
            while not self._answers():
                if self._process.poll() is not None or time.monotonic() - began > START_SECONDS:
                    self._said.seek(0)
                    raise RuntimeError(f"the S3 server did not start: {self._said.read()[-500:].decode()}")
                time.sleep(0.1)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._said.close()

    @property
    def environment(self) -> dict[str, str]:
        """For s3fs, Polars and everything else that reads AWS_*."""
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ALLOW_HTTP": "true",
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def served(self) -> dict[str, float]:
        """Since the start: requests, bytes (of answers' bodies), cpu_seconds of the server."""
        with urllib.request.urlopen(self.url + SERVED_PATH, timeout=30) as answer:
            counted: dict[str, float] = json.load(answer)
        used = psutil.Process(self._process.pid).cpu_times()
        return counted | {"cpu_seconds": used.user + used.system}

    def _answers(self) -> bool:
        try:
            self.served()
        except (urllib.error.URLError, OSError):
            return False
        return True


class Counted:
    """A WSGI application with a count of its requests and of the bytes it answers with."""

    def __init__(self, application: Callable[..., Iterable[bytes]]) -> None:
        self._application = application
        self._lock = threading.Lock()
        self._requests = self._bytes = 0

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        if environ["PATH_INFO"] == SERVED_PATH:
            start_response("200 OK", [("Content-Type", "application/json")])
            return [json.dumps({"requests": self._requests, "bytes": self._bytes}).encode()]
        body = list(self._application(environ, start_response))
        with self._lock:
            self._requests += 1
            self._bytes += sum(map(len, body))
        return body


def main() -> None:
    """Serve until terminated."""
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
    from werkzeug.serving import make_server

    class Quiet(MotoRequestHandler):
        def log_request(self, *_: object) -> None:
            """A line a request would be work that no real store does on this machine."""

    application = Counted(DomainDispatcherApplication(create_backend_app))
    make_server("127.0.0.1", int(sys.argv[1]), application, threaded=True, request_handler=Quiet).serve_forever()


if __name__ == "__main__":
    main()
