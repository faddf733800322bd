"""No secret comes through `redact` or `one_line`, wherever a library's message may carry it."""

import json
import string
from urllib.parse import quote

import fsspec.config
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from data_pipeline.config import PrepareConfig
from data_pipeline.errors import GenattError
from data_pipeline.redaction import one_line, redact
from data_pipeline.storage import filesystem

# Distinct from all that a message says otherwise, with the characters that keys of AWS and Azure have, and worse ones.
SECRETS = st.text(string.ascii_letters + string.digits + "/+=@:?#&%'\"()[]{},;!~^|\\<>", min_size=1, max_size=20).map(
    lambda text: f"Zq{text.replace('://', '')}qZ"  # which in a password would read as the next URL of a chain
)
SCHEMES = st.sampled_from(["s3", "s3a", "gs", "abfs", "https", "http", "ftp"])
BEFORE = st.sampled_from(["", "cannot open ", "Cannot connect to host x:1 [", "GET '", "a\nb\t"])
AFTER = st.sampled_from(["", " failed", "\nretry", " (503)", ": Forbidden"])
each_example = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def leaks(said: str, secret: str) -> bool:
    """Whether `secret`, or either end of it, is in `said`."""
    return secret in said or "Zq" in said or "qZ" in said


@given(scheme=SCHEMES, secret=SECRETS)
@example(scheme="s3", secret="Zqa/b@c/dqZ")
@example(scheme="https", secret="Zq:443qZ")
@each_example
def test_user_and_password_are_cut(scheme, secret):
    for url in (f"{scheme}://user:{secret}@host:9000/log", f"{scheme}://{quote(secret, safe='')}@host:9000/log"):
        assert not leaks(redact(url), secret)
        assert not leaks(redact(f"simplecache::{url}"), secret)


@given(scheme=SCHEMES, secret=SECRETS, before=BEFORE, after=AFTER)
@each_example
def test_urls_in_messages_lose_user_password_and_query(scheme, secret, before, after):
    for url in (
        f"{scheme}://user:{secret}@host/log",
        f"{scheme}://host/log?X-Amz-Credential=k&X-Amz-Signature={secret}",
        f"{scheme}://host/log?{secret}",
        f"{scheme}://host/log#{secret}",
    ):
        said = one_line(OSError(f"{before}{url}{after}"))
        assert not leaks(said, secret)
        assert "\n" not in said


@given(secret=SECRETS.filter(lambda secret: "&" not in secret))
@pytest.mark.parametrize(
    "name", ["X-Amz-Signature", "X-Amz-Security-Token", "X-Goog-Signature", "sig", "AWSAccessKeyId"]
)
@each_example
def test_query_of_a_presigned_url_without_its_host_is_cut(name, secret):
    assert not leaks(one_line(OSError(f"404, path=/bucket/log?a=1&{name}={secret}&b=2")), secret)


@given(secret=SECRETS, before=BEFORE, after=AFTER)
@pytest.mark.parametrize(
    "name", ["AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AZURE_STORAGE_ACCOUNT_KEY", "AZURE_STORAGE_SAS_TOKEN"]
)
@each_example
def test_secrets_of_the_environment_are_cut(name, secret, before, after, monkeypatch):
    monkeypatch.setenv(name, secret)
    for form in (secret, quote(secret, safe=""), json.dumps({"key": secret}), repr(secret)):
        assert not leaks(one_line(ValueError(f"{before}{form}{after}")), secret)


@given(secret=SECRETS, nested=st.booleans())
@pytest.mark.parametrize("option", ["secret", "token", "password", "account_key", "sas_token", "aws_secret_access_key"])
@each_example
def test_secrets_of_storage_options_are_cut(option, secret, nested, monkeypatch):
    options = {option: secret}
    monkeypatch.setitem(fsspec.config.conf, "s3", {"client_kwargs": options} if nested else options)
    assert not leaks(one_line(TypeError(f"unexpected option {options}")), secret)


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("/data/a@b:c?d=e#f", "/data/a@b:c?d=e#f"),
        ("s3://bucket/users/me@example.com/log", "s3://bucket/users/me@example.com/log"),
        ("http://127.0.0.1:9000/log", "http://127.0.0.1:9000/log"),
        ("http://[::1]:9000/log", "http://[::1]:9000/log"),
        ("s3://key:secret@bucket/log?token=1", "s3://bucket/log"),
        ("abfs://container@account.dfs.core.windows.net/log", "abfs://container@account.dfs.core.windows.net/log"),
        ("https://token@host/log", "https://host/log"),
        ("zip://a.csv::https://user:password@host/log.zip", "zip://a.csv::https://host/log.zip"),
    ],
)
def test_what_is_no_secret_stays(path, said):
    assert redact(path) == said


def test_message_of_an_error_without_text_is_its_kind():
    assert one_line(TimeoutError()) == "TimeoutError"
    assert one_line(OSError("a\n  b")) == "a b"


@pytest.mark.parametrize("scheme", ["ftp", "simplecache::ftp", "hdfs", "nosuch"])
def test_pieces_of_a_path_that_a_library_repeats_are_cut(scheme):
    """As in "Port could not be cast to integer value as 'SECRET'", where a password holds a slash."""
    with pytest.raises(GenattError) as caught:
        filesystem(f"{scheme}://user:ZqZqZq/qZqZqZ@host/log")
    assert not leaks(str(caught.value), "ZqZqZq/qZqZqZ")


def test_options_are_shown_without_secrets():
    path = "s3://key:ZqqZ@bucket/log"
    assert not leaks(repr(PrepareConfig(source=path, out=path, items=path, append_to=path)), "ZqqZ")
    with pytest.raises(ValidationError) as caught:
        PrepareConfig(source="s3://k:ZqqZ@b", out="o", time_column=None, time_from=1)
    assert not leaks(str(caught.value), "ZqqZ")
