"""What a run that failed leaves: its directory where there is something to look at, else nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_data import run_config

from data_pipeline.errors import GenattError
from genatt_dist import runs
from genatt_dist.training.nonfinite import NONFINITE


@pytest.mark.parametrize("left", [True, False])
def test_the_batch_of_a_loss_that_was_no_number_is_kept(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left: bool
) -> None:
    def launch(run: Path, *_: Any) -> None:
        if left:
            (run / NONFINITE).write_text("{}")
        raise GenattError("loss is nan")

    monkeypatch.setattr(runs, "launch", launch)
    run = tmp_path / "run"
    with pytest.raises(GenattError, match="loss is nan"):
        runs.train(run_config(prepared), run)
    assert run.exists() == left
