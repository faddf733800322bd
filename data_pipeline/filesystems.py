"""Which file system a path means, set up to fail in bounded time, and what its errors mean for the user."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import fsspec

from data_pipeline.errors import GenattError
from data_pipeline.redaction import one_line, redact

OPTIONS: dict[str, dict[str, Any]] = {
    "gs": {"requests_timeout": 60, "use_listings_cache": False},
    "abfs": {"connection_timeout": 5, "read_timeout": 60, "use_listings_cache": False},
}
ALIASES = {"gcs": "gs", "az": "abfs", "abfss": "abfs", "s3a": "s3"}
S3_SCHEMES = ("s3://", "s3a://")
EXTRAS = {"gs": "gcs", "abfs": "azure"}  # of pyproject.toml


def filesystem(path: str, **options: Any) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of `path` and the path inside it; no connection is made yet.

    Endpoint and credentials are the environment's (AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, AWS_PROFILE, …), or fsspec's
    own configuration (FSSPEC_S3_ANON, …).

    Raises
    ------
    GenattError
        An unknown protocol, one whose extra is not installed, or credentials in the path.
    """
    scheme = path.partition("://")[0] if "://" in path else "file"
    scheme = ALIASES.get(scheme, scheme)
    try:
        if scheme == "s3":
            return _s3(path, options)
        fs, inner = fsspec.core.url_to_fs(path, **OPTIONS.get(scheme, {}), **options)
    except (ValueError, ImportError, OSError) as error:
        if scheme in EXTRAS and isinstance(error, ImportError):
            raise GenattError(
                f"cannot open {redact(path)}: {scheme}:// is not installed: pip install 'genatt-dist[{EXTRAS[scheme]}]'"
            ) from error
        raise GenattError(
            f"cannot open {redact(path)}: {one_line(error, path)}: check the protocol before ://"
        ) from error
    return fs, inner


def _s3(path: str, options: dict[str, Any]) -> tuple[fsspec.AbstractFileSystem, str]:
    from data_pipeline.s3 import S3  # 0.3 s, and `genatt --help` needs none of it

    inner = S3._strip_protocol(path)
    bucket = inner.split("/")[0]
    if "@" in bucket or (":" in bucket and not bucket.startswith("arn:")):
        raise GenattError(
            f"cannot open {redact(path)}: credentials in the path: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )
    environment = hash(frozenset(item for item in os.environ.items() if item[0].startswith("AWS_")))
    return S3(environment=environment, **options), inner


@contextmanager
def explaining(path: str, action: str) -> Iterator[None]:
    """For what is done with `filesystem(path)` itself: whatever fails in the block is one `GenattError`.

    Parameters
    ----------
    action
        What is done to `path`, as in "cannot {action} {path}".
    """
    try:
        yield
    except GenattError:
        raise
    except Exception as error:  # each store has its own kinds of errors
        raise explained(path, action, error) from error


def explained(path: str, action: str, error: BaseException) -> GenattError:
    """The one line for `error`, raised when the program tried to `action` what is at `path`."""
    if isinstance(error, GenattError):
        return error
    what = f"cannot {action} {redact(path)}"
    if path.startswith(S3_SCHEMES):
        from data_pipeline import s3

        fs, inner = filesystem(path)
        return GenattError(f"{what}: {s3.explain(error, inner.split('/')[0], fs.endpoint)}")
    mend = "choose an --out you may write to" if action == "write" else "check the path and your access"
    return GenattError(f"{what}: {one_line(error, path)}: {mend}")
