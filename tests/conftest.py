"""A tiny prepared data set and a tiny trained run, made once for all tests that only read them."""

import signal
from pathlib import Path

import pytest
from tiny_data import histories, run_config, write_prepared

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # of a shell's background job; what tests start would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sequence shards with integer ids."""
    path = tmp_path_factory.mktemp("data") / "tiny"
    write_prepared(path, histories())
    return path


@pytest.fixture(scope="session")
def prepared_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same interactions with text ids, items with leading zeros."""
    path = tmp_path_factory.mktemp("data") / "tiny-text"
    write_prepared(path, histories(), text_ids=True)
    return path


@pytest.fixture(scope="session")
def trained_run(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of dot-product attention that trained for two epochs in a process of its own."""
    from genatt_dist import runs

    run = tmp_path_factory.mktemp("runs") / "tiny"
    runs.train(run_config(prepared), run)
    return run
