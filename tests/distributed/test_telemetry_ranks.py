"""Measuring changes no result, on any number of ranks; and every rank's memory is in the summary."""

import json
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import ranks
import torch
import torch.distributed as dist

from genatt_dist import config as configuration
from genatt_dist.config import RunConfig
from genatt_dist.training.timing import SECTIONS

_DIFFUSION = "model.attention={type: diffusion, rank: 4, generator_size: 8}"
_SHARDED = ("table.kind=sharded", "loss.kind=full")


def trained(folder: Path, config: RunConfig, measured: bool) -> tuple[list[float], dict[str, Any]]:
    """Losses of the log, on rank 0, and the dense parameters at the end. measured: else without timer and counter."""
    from genatt_dist.training import performance, step, trainer, update_log

    run = folder / ("measured" if measured else "plain")
    if torch.distributed.get_rank() == 0:
        run.mkdir()
        (run / "config.yaml").write_text(configuration.dump(config))
    torch.distributed.barrier()
    ranks.partition_every_parameter()
    update_log._LOG_STEPS = 1
    work = trainer.Trainer(run, config, torch.device("cpu"), "test", False)
    if measured:
        work.run()
    else:
        nothing = mock.MagicMock(**{"__getitem__.side_effect": lambda name: nullcontext()})
        with (
            mock.patch.object(work.learner._step, "_timer", nothing),
            mock.patch.object(performance, "counted", return_value=nullcontext(performance.Count())),
            mock.patch.object(performance, "_WATCHED_FIRST", -1),
        ):
            work.run()
    assert step.SectionTimer is performance.SectionTimer
    state = {name: value.numpy() for name, value in work.learner.engine.state().items()}
    if torch.distributed.get_rank():
        return [], state
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["kind"] == "train"], state


def both(folder: Path, config: RunConfig, world_size: int) -> dict[str, Any]:
    """Trains with and without measuring; returns the summary of the former."""
    measured, plain = (
        ranks.run_in_group(trained, world_size, folder, config, flag, seconds=120)[0] for flag in (True, False)
    )
    assert measured[0] == plain[0]
    assert len(measured[0]) >= 4
    for name, value in plain[1].items():
        np.testing.assert_array_equal(measured[1][name], value, err_msg=name)
    return dict(json.loads((folder / "measured" / "summary.json").read_text())["performance"])


@pytest.mark.slow
@pytest.mark.distributed
def test_measuring_changes_no_bit(make_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    """Two ranks, a sharded table under the full softmax, parameters taken apart, keyed dropout."""
    found = both(tmp_path, make_config(*_SHARDED, "training.zero_stage=3", "training.epochs=1"), 2)
    assert len(found["peak_memory_gib"]["host"]) == 2
    assert min(found["peak_memory_gib"]["host"]) > 0.05
    assert 0 < found["exchange_share"] < 1
    assert 0 < found["exchange_seconds"] < found["step_seconds"]["total"]
    assert len(found["own_seconds"]) == 2
    assert found["flops_per_step"] > 0
    assert all(found["step_seconds"][name] > 0 for name in SECTIONS)


def delayed() -> tuple[list[float], list[list[str]], dict[str, Any]]:
    """Steps of an all-reduce and an asynchronous one, in which rank 1 computes 40 ms and rank 0 hardly at all."""
    from genatt_dist.training.engine import sum_over_ranks
    from genatt_dist.training.performance import Performance

    rank, before = dist.get_rank(), (dist.all_reduce, dist.Work.wait)
    measured = Performance(torch.device("cpu"), torch.float32, rank, 2)
    shares, lines = [], []
    for _ in range(6):
        since = time.perf_counter()
        for _ in range(10):
            with measured.step([]):
                time.sleep(0.04 if rank else 0.004)
                for later in (False, True):
                    work = dist.all_reduce(torch.ones(8), async_op=later)
                    if later:
                        work.wait()
        shares.append(measured.interval(since)[1]["exchange_share"])
        lines.append(measured.slow_ranks(sum_over_ranks))
    assert (dist.all_reduce, dist.Work.wait) == before
    return shares, lines, measured.summary(sum_over_ranks)


@pytest.mark.distributed
def test_a_slow_rank_is_told_once_and_the_other_waits_for_it() -> None:
    (waiting, lines, summary), (working, others, _) = ranks.run_in_group(delayed, 2)
    assert min(waiting) > 0.5
    assert max(working) < 0.5
    assert lines == others
    assert [len(each) for each in lines] == [0, 0, 1, 0, 0, 0]  # three watched steps first, and then not again
    assert lines[2][0].startswith("rank 1 is slow: ")
    assert summary["own_seconds"][1] > 0.04 > summary["own_seconds"][0]
    assert summary["exchange_seconds"] > 0.015  # the mean of 36 ms and almost nothing


@pytest.mark.exhaustive
@pytest.mark.distributed
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("table", ["replicated", "sharded", "full"])
@pytest.mark.parametrize("attention", ["model.attention.type=dot_product", _DIFFUSION])
def test_measuring_changes_no_bit_of_any_kind(
    make_config: Callable[..., RunConfig], tmp_path: Path, stage: int, table: str, attention: str
) -> None:
    overrides = {"replicated": ("table.kind=replicated",), "sharded": ("table.kind=sharded",), "full": _SHARDED}[table]
    config = make_config(*overrides, attention, f"training.zero_stage={stage}", "training.epochs=2", "world_size=1")
    assert both(tmp_path, config, 1)["flops_per_step"] > 0
