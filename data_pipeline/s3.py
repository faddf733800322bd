"""S3 with one bounded retry around everything it does, and with `OSError` for everything that fails.

s3fs and botocore each retry by count, one inside the other: a store that refuses everything holds them for minutes.
Here neither retries; a request, and the reading of an answer's body, is tried again until a deadline.
"""

import asyncio
import errno
import os
import random
import time
from typing import Any
from urllib.parse import urlsplit

import botocore.exceptions
import s3fs
from aiohttp import ClientPayloadError
from botocore.exceptions import (
    BotoCoreError,
    HTTPClientError,
    NoCredentialsError,
    PartialCredentialsError,
    SSLError,
)
from botocore.parsers import ResponseParserError
from fsspec.asyn import sync_wrapper

from data_pipeline.redaction import one_line, redact

CONNECT_SECONDS = 5  # to open a connection
SILENCE_SECONDS = 15  # without a byte, once connected
RETRY_SECONDS = 25  # no new try begins this long after the first
LIMIT_SECONDS = RETRY_SECONDS + CONNECT_SECONDS + SILENCE_SECONDS  # what always fails is an error by then

FIRST_WAIT_SECONDS = 0.2  # between two tries; doubled from try to try, up to:
LONGEST_WAIT_SECONDS = 5.0

RETRIED_STATUS = frozenset({429, 500, 502, 503, 504})
RETRIED_CODES = frozenset({"InternalError", "RequestTimeout", "ServiceUnavailable", "SlowDown", "Throttling"})
RETRIED_ERRORS = (
    ClientPayloadError,  # the connection broke inside a body
    botocore.exceptions.ConnectionError,
    HTTPClientError,
    ResponseParserError,  # a proxy's page instead of an answer
    TimeoutError,
    ConnectionError,
)
LIBRARY_ERRORS = (OSError, BotoCoreError, HTTPClientError, ResponseParserError, ClientPayloadError)


WRONG_CREDENTIALS = frozenset(
    {"ExpiredToken", "InvalidAccessKeyId", "InvalidSecurity", "InvalidToken", "SignatureDoesNotMatch"}
)
CREDENTIALS_MEND = "check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN and AWS_PROFILE"


class GaveUpError(OSError):
    """The last error of a request that kept failing; it is not tried again by what made the request."""


class S3(s3fs.S3FileSystem):
    """`s3fs.S3FileSystem` that retries by time, lists afresh every time, and raises `OSError`.

    Parameters
    ----------
    environment
        Any number that changes with the credentials in use. fsspec keeps one instance for each set of arguments, and
        would go on with old credentials without it.
    retry_seconds, connect_seconds, silence_seconds
        See the constants above.
    """

    retries = 1

    def __init__(
        self,
        *args: Any,
        environment: int = 0,
        retry_seconds: float = RETRY_SECONDS,
        connect_seconds: float = CONNECT_SECONDS,
        silence_seconds: float = SILENCE_SECONDS,
        **kwargs: Any,
    ) -> None:
        self.retry_seconds = retry_seconds
        bounded = {
            "connect_timeout": connect_seconds,
            "read_timeout": silence_seconds,
            "retries": {"total_max_attempts": 1},
        }
        kwargs["config_kwargs"] = {**kwargs.get("config_kwargs", {}), **bounded}
        super().__init__(*args, **{"use_listings_cache": False, **kwargs})

    @property
    def endpoint(self) -> str:
        """Host and port of the store, without user and password."""
        url = self._s3 and self._s3.meta.endpoint_url
        url = url or self.endpoint_url or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        return urlsplit(redact(url)).netloc or redact(url) if url else "amazonaws.com"

    async def _call_s3(self, method: str, *options: dict, **arguments: Any) -> Any:
        tries = _Tries(self.retry_seconds)
        while True:
            try:
                return await super()._call_s3(method, *options, **arguments)
            except LIBRARY_ERRORS as error:
                wait = tries.wait_after(error)
            except ValueError as error:  # botocore's for an endpoint that is no URL
                raise OSError(errno.EINVAL, str(error)) from error
            await asyncio.sleep(wait)

    call_s3 = sync_wrapper(_call_s3)  # s3fs' own is bound to its own _call_s3

    async def _cat_file(self, path: str, *args: Any, **kwargs: Any) -> bytes:
        tries = _Tries(self.retry_seconds)
        while True:
            try:
                content: bytes = await super()._cat_file(path, *args, **kwargs)
                return content
            except LIBRARY_ERRORS as error:
                wait = tries.wait_after(error)
            await asyncio.sleep(wait)

    def _open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        file = super()._open(path, mode, **options)
        if mode == "rb":
            file.cache.fetcher = self._retrying_fetch(file.cache.fetcher)
        return file

    def _retrying_fetch(self, fetch: Any) -> Any:
        def fetch_again(start: int, end: int) -> bytes:
            tries = _Tries(self.retry_seconds)
            while True:
                try:
                    content: bytes = fetch(start, end)
                    return content
                except LIBRARY_ERRORS as error:
                    wait = tries.wait_after(error)
                time.sleep(wait)

        return fetch_again


class _Tries:
    """The tries of one operation: how long to wait before the next one, and when there is no next one."""

    def __init__(self, retry_seconds: float) -> None:
        self.retry_seconds = retry_seconds
        self.start = time.monotonic()
        self.wait = FIRST_WAIT_SECONDS

    def wait_after(self, error: Exception) -> float:
        """Seconds to wait; raises where trying again cannot help, or not in time."""
        if not is_transient(error):
            if isinstance(error, OSError):
                raise error
            raise as_os_error(error) from error
        passed = time.monotonic() - self.start
        if passed + self.wait > self.retry_seconds:
            raise GaveUpError(f"{_said(error)} (tried for {passed:.0f} s)") from error
        wait = self.wait * random.uniform(0.5, 1)  # workers that were refused together return apart
        self.wait = min(2 * self.wait, LONGEST_WAIT_SECONDS)
        return wait


def is_transient(error: BaseException) -> bool:
    """Whether the same request may succeed later: refused for load, failed inside the store, or lost on the way."""
    if isinstance(error, GaveUpError | SSLError):
        return False
    if isinstance(error, RETRIED_ERRORS):
        return True
    answer = answer_of(error)
    status = answer.get("ResponseMetadata", {}).get("HTTPStatusCode")
    return status in RETRIED_STATUS or code_of(error) in RETRIED_CODES


def answer_of(error: BaseException | None) -> dict[str, Any]:
    """What the store answered, as botocore parsed it, from `error` or what caused it; empty where none came."""
    while error is not None:
        if isinstance(answer := getattr(error, "response", None), dict):
            return answer
        error = error.__cause__
    return {}


def code_of(error: BaseException) -> str:
    """The store's code for what went wrong (`NoSuchBucket`; of a HEAD request the status: `404`), or nothing."""
    return str(answer_of(error).get("Error", {}).get("Code", ""))


def explain(error: BaseException, bucket: str, endpoint: str) -> str:
    """What went wrong and what to check, in one line without secrets."""
    code, said, cause = code_of(error), one_line(error), error.__cause__
    if isinstance(cause, NoCredentialsError | PartialCredentialsError):
        return (
            f"no credentials for bucket {bucket!r} at {endpoint}: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or "
            "AWS_PROFILE (FSSPEC_S3_ANON=true for a public bucket)"
        )
    if code in WRONG_CREDENTIALS:
        return f"credentials refused at {endpoint} ({code}): {CREDENTIALS_MEND}"
    if code == "NoSuchBucket":
        bucket = answer_of(error)["Error"].get("BucketName", bucket)
        return f"no bucket {bucket!r} at {endpoint}: check its name, and AWS_ENDPOINT_URL"
    if isinstance(error, PermissionError):
        return f"access to bucket {bucket!r} denied at {endpoint} ({said}): check its policy; {CREDENTIALS_MEND}"
    if isinstance(error, FileNotFoundError):
        return f"no such file in bucket {bucket!r} at {endpoint}: check the path"
    if isinstance(error, GaveUpError) and not answer_of(error):
        return f"no answer from {endpoint}: {said}: check AWS_ENDPOINT_URL and the network"
    return f"{endpoint} says {said}: try again later, or check bucket {bucket!r} and AWS_ENDPOINT_URL"


def as_os_error(error: Exception) -> OSError:
    """The `OSError` nearest to an error of botocore."""
    if isinstance(error, NoCredentialsError | PartialCredentialsError):
        return PermissionError(errno.EACCES, str(error))
    return OSError(errno.EIO, _said(error))


def _said(error: Exception) -> str:
    return f"{code_of(error) or type(error).__name__}: {getattr(error, 'strerror', None) or error}"
