"""Downloads that go on where they were cut off, say how far they are, and never hang.

`requests` does the HTTP (proxies, TLS, both time limits). Resuming is ours: neither it, nor pooch, nor fsspec's HTTP
file system continues a partial file.
"""

import errno
import http.client
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import requests
import urllib3
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from data_pipeline.storage import one_line

CONNECT_SECONDS = 5
STALL_SECONDS = 30  # without a byte; there is no limit while bytes flow
WAITS = (0.5, 1.0, 2.0, 4.0)  # seconds between tries that brought nothing new; one try more than these
PIP_SECONDS = 120
CHUNK = 1 << 16

Lost = (requests.RequestException, urllib3.exceptions.HTTPError, http.client.HTTPException)


class UnavailableError(Exception):
    """An address does not give what it should; the message says why, in one line."""


def download(address: str, target: Path, console: Console) -> Path:
    """Downloads `address` beside `target`, to `TARGET.part`, and returns that path.

    What is there from an earlier try is kept and continued, if the server has still the same content.

    Parameters
    ----------
    address
        A URL, or `pip:REQUIREMENT`: the wheel of that requirement, which pip downloads and does not install.

    Raises
    ------
    UnavailableError
        The address cannot be reached, refuses, or stalls.
    OSError
        The file cannot be written.
    """
    part = target.with_name(f"{target.name}.part")
    if address.startswith("pip:"):
        _wheel(address.removeprefix("pip:"), part)
        return part
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), DownloadColumn(), TransferSpeedColumn())
    bar = Progress(*columns, TimeRemainingColumn(), console=console, disable=console.quiet)
    task = bar.add_task(target.name, total=None)
    with requests.Session() as session, _stopping(bar):
        largest = failures = 0
        while True:
            try:
                _continue(session, address, part, partial(_show, bar, task))
                return part
            except Lost as error:
                size = part.stat().st_size if part.exists() else 0
                failures = 1 if size > largest else failures + 1
                largest = max(largest, size)
                if _final(error) or failures > (len(WAITS) if largest else 1):
                    raise UnavailableError(_reason(error)) from error
                time.sleep(WAITS[failures - 1])


def discard(target: Path) -> None:
    """Removes what `download` keeps beside `target`."""
    for ending in (".part", ".part.version"):
        target.with_name(target.name + ending).unlink(missing_ok=True)


@contextmanager
def _stopping(progress: Progress) -> Iterator[None]:
    """Ends the bar after the block, where it was begun: an error before the first byte is the only line."""
    try:
        yield
    finally:
        if progress.live.is_started:
            progress.stop()


def _show(progress: Progress, task: TaskID, done: int, total: int | None) -> None:
    progress.start()
    progress.update(task, completed=done, total=total)


def _continue(session: requests.Session, address: str, part: Path, report: Callable[[int, int | None], None]) -> None:
    """One request for what `part` lacks; reports (bytes done, bytes in all where the server tells)."""
    version = part.with_name(f"{part.name}.version")  # ETag, or time of change, of what `part` is of
    have = part.stat().st_size if part.exists() and version.exists() else 0
    headers = {"Accept-Encoding": "identity", "User-Agent": "genatt"}
    if have and (validator := version.read_text()):
        headers |= {"Range": f"bytes={have}-", "If-Range": validator}  # another version is sent whole
    with session.get(address, headers=headers, stream=True, timeout=(CONNECT_SECONDS, STALL_SECONDS)) as response:
        if response.status_code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            part.unlink()
            raise requests.ConnectionError("the server has fewer bytes than an earlier try left")
        response.raise_for_status()
        if response.status_code == http.HTTPStatus.PARTIAL_CONTENT:
            if not response.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
                part.unlink()
                raise requests.ConnectionError("the server sent another range than asked for")
        else:
            have = 0
        length = response.headers.get("Content-Length", "")
        rest = int(length) if length.isdecimal() else None
        if rest is not None and rest > shutil.disk_usage(part.parent).free:
            raise OSError(errno.ENOSPC, f"{rest:,} bytes to come, {shutil.disk_usage(part.parent).free:,} free")
        with part.open("ab" if have else "wb") as file:
            version.write_text(_validator(response))
            total = None if rest is None else have + rest
            report(have, total)
            for chunk in response.raw.stream(CHUNK, decode_content=False):
                file.write(chunk)
                have += len(chunk)
                report(have, total)


def _validator(response: requests.Response) -> str:
    """What If-Range compares: a strong ETag, else the time of change, else nothing (and no resuming)."""
    etag = response.headers.get("ETag", "")
    return etag if etag and not etag.startswith("W/") else response.headers.get("Last-Modified", "")


def _final(error: Exception) -> bool:
    """Whether trying again is of no use."""
    if isinstance(error, requests.HTTPError) and error.response is not None:
        status = error.response.status_code
        return status < 500 and status not in (http.HTTPStatus.REQUEST_TIMEOUT, http.HTTPStatus.TOO_MANY_REQUESTS)
    return isinstance(error, requests.exceptions.SSLError | ValueError)  # ValueError: a malformed URL or proxy


def _reason(error: Exception) -> str:
    if isinstance(error, requests.HTTPError) and error.response is not None:
        return f"HTTP {error.response.status_code} {error.response.reason}"
    if isinstance(error, requests.exceptions.ProxyError):
        return "the proxy cannot be reached, or refuses: check HTTPS_PROXY and HTTP_PROXY"
    if isinstance(error, requests.ConnectTimeout):
        return f"no connection within {CONNECT_SECONDS} s"
    if isinstance(error, requests.Timeout | urllib3.exceptions.ReadTimeoutError):
        return f"no byte for {STALL_SECONDS} s"
    cause: BaseException = error
    while cause.args and isinstance(inner := getattr(cause.args[-1], "reason", cause.args[-1]), BaseException):
        cause = inner
    return re.sub(r"^<[^>]*>: |^\w+\([^)]*\): ", "", one_line(cause))  # without the object that the error is of


def _wheel(requirement: str, target: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet", "--retries", "1"]
    with tempfile.TemporaryDirectory(dir=target.parent) as directory:
        command += ["--disable-pip-version-check", "--timeout", str(3 * CONNECT_SECONDS), "-d", directory, requirement]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=PIP_SECONDS, check=False)
        except subprocess.TimeoutExpired as error:
            raise UnavailableError(f"pip was not done after {PIP_SECONDS} s") from error
        wheels = list(Path(directory).glob("*.whl"))
        if done.returncode or not wheels:
            said = done.stderr.strip().splitlines() or ["pip failed without a word"]
            raise UnavailableError(one_line(OSError(said[-1])))
        wheels[0].replace(target)
