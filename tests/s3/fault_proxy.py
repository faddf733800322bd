"""An HTTP proxy in front of one S3 server that answers wrongly, late or not at all, as it is told."""

import fnmatch
import http.client
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

ALL = ("GET", "HEAD", "PUT", "POST", "DELETE")
CHUNK = 1 << 20


@dataclass(frozen=True)
class Request:
    """`key` is empty for requests of the bucket itself, listings among them. `range` is the header's value."""

    method: str
    bucket: str
    key: str
    range: str | None


@dataclass
class Fault:
    """What to do with requests that fit; `left` more times (none: without end), after letting `skip` of them pass."""

    kind: str  # status, cut, refuse, slow, silent
    methods: tuple[str, ...]
    key: str
    left: int | None = None
    skip: int = 0
    status: int = 503
    code: str = "SlowDown"
    seconds: float = 0.0
    buckets_too: bool = False

    def fits(self, request: Request) -> bool:
        if request.method not in self.methods or self.left == 0:
            return False
        return fnmatch.fnmatchcase(request.key, self.key) if request.key else self.buckets_too


class Faults:
    """Faults to come, and counts of what came. See the fixture `faults`."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.over = threading.Event()
        self.reset()

    def reset(self) -> None:
        with self.lock:
            self.over.set()  # lets go of what is slow or silent
            self.over = threading.Event()
            self.active: list[Fault] = []
            self.requests: list[Request] = []
            self.failed = 0

    def fail(
        self,
        next_n: int = 1,
        status: int = 503,
        code: str = "SlowDown",
        methods: tuple[str, ...] = ALL,
        key: str = "*",
        buckets_too: bool = False,
    ) -> None:
        """An error instead of an answer; `buckets_too`: listings as well."""
        self._add(Fault("status", methods, key, next_n, status=status, code=code, buckets_too=buckets_too))

    def fail_always(
        self, status: int = 503, code: str = "SlowDown", methods: tuple[str, ...] = ALL, key: str = "*"
    ) -> None:
        """The same for every request, listings too where `key` is not given."""
        self._add(Fault("status", methods, key, status=status, code=code, buckets_too=key == "*"))

    def vanish(self, key: str, after: int = 0) -> None:
        """404 for reads of `key`, after the next `after` GETs of it; listings still show it."""
        self._add(Fault("status", ("GET",), key, skip=after, status=404, code="NoSuchKey"))
        if after == 0:
            self._add(Fault("status", ("HEAD",), key, status=404, code="NoSuchKey"))

    def cut(self, next_n: int = 1, key: str = "*") -> None:
        """GETs whose body ends, with the connection, at its middle."""
        self._add(Fault("cut", ("GET",), key, next_n))

    def refuse(self, next_n: int = 1, methods: tuple[str, ...] = ALL, key: str = "*") -> None:
        """The connection is reset before an answer."""
        self._add(Fault("refuse", methods, key, next_n))

    def slow(self, seconds: float, methods: tuple[str, ...] = ALL, key: str = "*") -> None:
        """Each request of an object waits so long before it is served."""
        self._add(Fault("slow", methods, key, seconds=seconds))

    def silent(self, methods: tuple[str, ...] = ALL, key: str = "*") -> None:
        """Nothing is answered; listings neither where `key` is not given."""
        self._add(Fault("silent", methods, key, buckets_too=key == "*"))

    def count(self, method: str | None = None, key: str | None = None) -> int:
        """Requests with that method and key; without a key, those of buckets too."""
        with self.lock:
            return sum(
                (method is None or request.method == method)
                and (key is None or (request.key != "" and fnmatch.fnmatchcase(request.key, key)))
                for request in self.requests
            )

    def _add(self, fault: Fault) -> None:
        with self.lock:
            self.active.append(fault)

    def take(self, request: Request) -> list[Fault]:
        """Counts a request, and uses up one turn of each fault that strikes it."""
        with self.lock:
            self.requests.append(request)
            struck = []
            for fault in self.active:
                if not fault.fits(request):
                    continue
                if fault.skip:
                    fault.skip -= 1
                elif fault.kind == "slow" or not any(other.kind != "slow" for other in struck):
                    struck.append(fault)
                    fault.left = None if fault.left is None else fault.left - 1
            self.failed += bool(struck)
            return struck


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    faults: Faults
    upstream: int
    key_id: str

    def log_message(self, *args: Any) -> None:
        pass

    def handle_any(self) -> None:
        body = self._body()
        bucket, _, key = unquote(urlsplit(self.path).path).lstrip("/").partition("/")
        struck = self.faults.take(Request(self.command, bucket, key, self.headers.get("Range")))
        over = self.faults.over
        cut = False
        for fault in struck:
            if fault.kind == "slow":
                over.wait(fault.seconds)
            elif fault.kind == "silent":
                over.wait()
                return self._reset()
            elif fault.kind == "refuse":
                return self._reset()
            elif fault.kind == "status":
                return self._error(fault.status, fault.code)
            cut = cut or fault.kind == "cut"
        if found := re.search(r"Credential=([^/]+)/", self.headers.get("Authorization", "")):
            if found.group(1) != self.key_id:
                return self._error(403, "InvalidAccessKeyId")
        elif "X-Amz-Credential" not in self.path:
            return self._error(403, "AccessDenied")
        return self._forward(body, cut)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = handle_any

    def _body(self) -> bytes:
        if self.headers.get("Expect", "").lower() == "100-continue":
            pass  # BaseHTTPRequestHandler has answered it
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _forward(self, body: bytes, cut: bool) -> None:
        server = http.client.HTTPConnection("127.0.0.1", self.upstream, timeout=60)
        try:
            headers = {name: value for name, value in self.headers.items() if name.lower() not in _HOP}
            server.request(self.command, self.path, body=body or None, headers=headers)
            answer = server.getresponse()
            length = answer.getheader("Content-Length")
            content = b"" if self.command == "HEAD" else answer.read()
            self.send_response_only(answer.status, answer.reason)
            for name, value in answer.getheaders():
                if name.lower() not in _HOP:
                    self.send_header(name, value)
            self.send_header("Content-Length", (length or "0") if self.command == "HEAD" else str(len(content)))
            self.end_headers()
            if cut:
                self.wfile.write(content[: len(content) // 2])
                return self._reset()
            self.wfile.write(content)
        finally:
            server.close()

    def _error(self, status: int, code: str) -> None:
        content = (
            '<?xml version="1.0" encoding="UTF-8"?>'
            f"<Error><Code>{code}</Code><Message>The store says {code}.</Message></Error>"
        ).encode()
        self.send_response_only(status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", "0" if self.command == "HEAD" else str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _reset(self) -> None:
        self.wfile.flush()
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)


_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length", "expect", "server", "date"}


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, *args: Any) -> None:
        pass  # a client that went away


@contextmanager
def serve(upstream: int, key_id: str) -> Iterator[tuple[str, Faults]]:
    """Runs the proxy in threads of this process: its address, and what controls it."""
    faults = Faults()
    handler = type("Handler", (_Handler,), {"faults": faults, "upstream": upstream, "key_id": key_id})
    server = _Server(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", faults
    finally:
        faults.reset()
        server.shutdown()
        server.server_close()
        thread.join()
