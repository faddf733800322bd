"""What may be said aloud: paths and library messages without the secrets in them."""

import json
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import quote, unquote

import fsspec.config

HIDDEN = "***"
SECRET_VARIABLES = (
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_SECURITY_TOKEN",
    "AZURE_STORAGE_ACCOUNT_KEY",
    "AZURE_STORAGE_CLIENT_SECRET",
    "AZURE_STORAGE_CONNECTION_STRING",
    "AZURE_STORAGE_SAS_TOKEN",
    "AZURE_CLIENT_SECRET",
)
# Options of s3fs, gcsfs and adlfs, as set with FSSPEC_<PROTOCOL>_<OPTION> or in fsspec's configuration files.
SECRET_OPTIONS = frozenset(
    {
        "account_key",
        "aws_secret_access_key",
        "aws_session_token",
        "client_secret",
        "connection_string",
        "credential",
        "password",
        "private_key",
        "refresh_token",
        "sas_token",
        "secret",
        "token",
    }
)
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://\S*")
_CHAINED = re.compile(r"::(?=[A-Za-z][A-Za-z0-9+.-]*://)")
_PIECES = re.compile(r"[/@:?#&=]+")
_PORT = re.compile(r"(\[[0-9A-Fa-f:.]*\]|[^:\[\]]*):\d*")  # host:port, not user:password
_SIGNED = re.compile(  # what is left of a presigned URL when a library prints only its path and query
    r"(?i)\b((?:x-(?:amz|goog)-[a-z-]+|awsaccesskeyid|googleaccessid|signature|sig|access_token|credential)=)[^\s&]+"
)


def redact(path: str) -> str:
    """`path` without what may be secret in it: user, password and query string of a URL, or of each in a chain."""
    return "::".join(map(_redact_url, _CHAINED.split(path)))


def one_line(error: BaseException, path: str = "") -> str:
    """What an exception of a library says, in one line, without secrets: those in URLs and those in use here.

    Parameters
    ----------
    path
        What the library was given. It may repeat a piece of it: "SECRET is no port".
    """
    text = str(error)
    secrets = {*_secrets_in_use(), *_cut_pieces(path)}
    for secret in sorted(secrets, key=len, reverse=True):  # one may be part of another
        for written in (secret, quote(secret, safe=""), quote(secret), repr(secret)[1:-1], json.dumps(secret)[1:-1]):
            text = text.replace(written, HIDDEN)
    text = _SIGNED.sub(rf"\1{HIDDEN}", _URL.sub(lambda url: redact(url.group()), text))
    return " ".join(text.split()) or type(error).__name__


def _redact_url(url: str) -> str:
    scheme, mark, rest = url.partition("://")
    if not mark:
        return url
    rest = re.split(r"[?#]", rest, maxsplit=1)[0]
    authority, slash, path = rest.partition("/")
    if scheme in ("abfs", "abfss") and ":" not in authority and authority.count("@") == 1:
        return f"{scheme}://{rest}"  # container@account
    if "@" in rest and ("@" in authority or (":" in authority and not _PORT.fullmatch(authority))):
        return f"{scheme}://{rest.rpartition('@')[2]}"  # the last @: a raw password may have / and @ in it
    if ":" in authority and not _PORT.fullmatch(authority):
        return f"{scheme}://{HIDDEN}{slash}{path}" if slash else f"{scheme}://{HIDDEN}"
    return f"{scheme}://{rest}"


def _cut_pieces(path: str) -> Iterator[str]:
    """The pieces of `path` that are not in `redact(path)`, without those too short to be told from other words."""
    kept = _PIECES.split(redact(path))
    for piece in _PIECES.split(path):
        if len(piece) > 2 and piece not in kept:
            yield from (piece, unquote(piece))


def _secrets_in_use() -> Iterator[str]:
    for name in SECRET_VARIABLES:
        if value := os.environ.get(name):
            yield value
    yield from _option_values(fsspec.config.conf)


def _option_values(options: Mapping[str, Any]) -> Iterator[str]:
    for name, value in options.items():
        if isinstance(value, Mapping):
            yield from _option_values(value)
        elif name in SECRET_OPTIONS and isinstance(value, str) and value:
            yield value
