"""Ranks of `genatt bench scaling` that Ray has no room for are told of in time."""

from __future__ import annotations

import pytest

from benchmarks.scaling import ray_workers
from data_pipeline.errors import GenattError


@pytest.mark.ray
@pytest.mark.usefixtures("cluster")
def test_too_many_ranks_end_with_what_is_free(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_workers, "_LINE_SECONDS", 0.2)
    wanted = "3 ranks of 1 CPU each"
    with (
        pytest.raises(GenattError, match=f"no room for {wanted} in 1 s; the cluster has 2 CPU free: end other jobs"),
        ray_workers.start("no.module", 3, {}, 1.0),
    ):
        pass
    assert f"waiting for room for {wanted}; the cluster has 2 CPU free" in capsys.readouterr().err


@pytest.mark.ray
@pytest.mark.usefixtures("cluster")
def test_ranks_that_do_not_answer_are_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_workers, "_READY_SECONDS", 0.001)
    with (
        pytest.raises(GenattError, match="launcher=ray: not all of 1 ranks answered in 0 s: see `ray status`"),
        ray_workers.start("no.module", 1, {}, 60.0),
    ):
        pass
