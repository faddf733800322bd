"""`genatt bench steps`: the grid holds what is promised, a step is the product's own, rows say what was measured."""

import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from benchmarks.steps import lengths, targets
from benchmarks.steps.child import MIB, Alone, Child, Limits, NoMemoryError, environment
from benchmarks.steps.draw import draw
from benchmarks.steps.grid import FORMS, MAX_LENS, QUICK, STEPS, Grid, Variant, cells, scaled, select
from benchmarks.steps.measure import LEAST_REPEATS, row, write
from benchmarks.steps.run import run
from benchmarks.steps.work import Work, work
from data_pipeline.errors import GenattError
from genatt_dist.attention.denoiser import Denoiser
from genatt_dist.evaluation.steps_plots import steps_plots

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
FULL = Grid().variants()
SMALL = Variant("training", "diffusion", "factor", "one_step", 5, max_len=8, batch=4, lengths="all_n")
SERVED = Variant("serving", "diffusion", "factor", "ddim", 5, max_len=8, batch=4, lengths="all_n", sample_blocks="last")
MACHINE = {"device": "cpu", "threads": 2, "versions": {}}


# --- grid -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_len", MAX_LENS)
@pytest.mark.parametrize("softmax", [True, False])
def test_the_grid_holds_every_t_form_and_sampler_at_every_n(max_len: int, softmax: bool) -> None:
    found = {
        (variant.form, variant.sampler, variant.steps)
        for variant in FULL
        if (variant.mode, variant.max_len, variant.softmax) == ("training", max_len, softmax) and variant.steps
    }
    assert found == {(form, sampler, t) for form in FORMS for sampler in ("one_step", "unrolled") for t in STEPS}


@pytest.mark.parametrize("grid", [Grid(), QUICK], ids=["full", "quick"])
def test_every_cell_is_compared_with_one_dot_product(grid: Grid) -> None:
    variants = grid.variants()
    assert len(set(variants)) == len(variants)
    for members in cells(variants).values():
        assert [variant.attention for variant in members].count("dot_product") == 1
        assert members[0].attention == "dot_product"


def test_batches_hold_the_same_number_of_positions_at_every_n() -> None:
    assert [scaled(256, max_len) for max_len in MAX_LENS] == [256, 128, 64]
    assert scaled(256, 8) == 256


@pytest.mark.parametrize("target", targets.TARGETS, ids=lambda target: target.what)
def test_every_target_speaks_of_a_row_of_the_grid(target: targets.Target) -> None:
    for wanted in (target.wanted, target.over):
        if wanted is not None:
            rows = [v for v in FULL if all(getattr(v, name) == value for name, value in wanted.items())]
            assert len(rows) == 1


def test_a_selection_keeps_the_dot_product_it_is_compared_with() -> None:
    chosen = select(FULL, ["sampler=unrolled", "steps=50,100", "max_len=200", "softmax=true"])
    assert {variant.attention for variant in chosen} == {"dot_product", "variational", "diffusion"}
    assert {variant.steps for variant in chosen} == {None, 50, 100}
    assert {variant.mode for variant in chosen} == {"training"}
    chosen = select(FULL, ["attention=diffusion", "mode=serving", "form=matrix", "batch=1"])
    assert {variant.attention for variant in chosen} == {"dot_product", "diffusion"}


@pytest.mark.parametrize(
    ("filters", "message"),
    [
        (["sampled=ddim"], "unknown field 'sampled': did you mean sampler?"),
        (["form=factors"], "no variant of the grid has form=factors: use factor, matrix"),
        (["mode=serving", "sampler=unrolled"], "leaves nothing to measure"),
    ],
)
def test_a_selection_that_cannot_be(filters: list[str], message: str) -> None:
    with pytest.raises(GenattError, match=message.replace("?", r"\?")):
        select(FULL, filters)


def test_steps_that_are_no_numbers_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(GenattError, match="--max-len 50,x: give whole numbers"):
        run(tmp_path / "out.json", True, [], {"max_lens": "50,x"}, {}, {}, console=None)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


# --- lengths and work -------------------------------------------------------------------------------------------------


def test_rows_never_go_where_the_figures_go(tmp_path: Path) -> None:
    with pytest.raises(GenattError, match=r"rows are JSON.*choose .*rows\.json"):
        run(tmp_path / "rows.png", True, [], {}, {}, {}, Console())
    assert list(tmp_path.iterdir()) == []


def test_lengths_follow_the_histogram_of_beauty() -> None:
    counts = {int(n): count for n, count in json.loads(lengths.HISTOGRAM.read_text())["counts"].items()}
    users = sum(counts.values())
    assert users == 22_363
    size = 200_000
    drawn = lengths.draw("beauty", size, 50, np.random.Generator(np.random.Philox(key=1)))
    assert (drawn.min(), drawn.max()) == (2, 50)
    for length in range(2, 51):
        share = sum(count for n, count in counts.items() if min(n, 50) == length) / users
        # 49 checks: at 5 standard errors all pass with probability above 0.9999.
        assert abs(np.mean(drawn == length) - share) < 5 * math.sqrt(share * (1 - share) / size) + 1e-9


def test_batches_of_beauty_hold_equal_tokens_and_are_the_same_for_all_variants() -> None:
    variant = replace(SMALL, max_len=50, batch=32, lengths="beauty", softmax=False)
    batches = work(variant, CPU, 100).inputs(32)
    assert len(batches) == 4
    tokens = [batch.num_tokens for batch, *_ in batches]
    assert max(tokens) - min(tokens) <= 2 * 50  # a cut may miss the budget by a window at either end
    widths = [batch.layout.width for batch, *_ in batches]
    assert widths == sorted(widths)
    assert widths[0] < widths[-1] <= 50
    other = work(replace(variant, attention="dot_product", form=None, sampler=None, steps=None), CPU, 100).inputs(32)
    for (mine, *_), (theirs, *_) in zip(batches, other, strict=True):
        assert torch.equal(mine.items_M, theirs.items_M)


@pytest.fixture
def denoised(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of each call of a denoiser."""
    calls: list[int] = []
    forward = Denoiser.forward

    def counted(self: Denoiser, r_NHK: torch.Tensor, *rest: Any, **more: Any) -> torch.Tensor:
        calls.append(len(r_NHK))
        return forward(self, r_NHK, *rest, **more)

    monkeypatch.setattr(Denoiser, "forward", counted)
    return calls


def once(variant: Variant) -> Work:
    subject = work(variant, CPU, num_items=60)
    for given in subject.inputs(variant.batch):
        subject.run(given, 0)
    return subject


@pytest.mark.parametrize("softmax", [True, False])
def test_one_step_denoises_once_a_block_and_unrolled_t_times_more(denoised: list[int], softmax: bool) -> None:
    once(replace(SMALL, softmax=softmax))
    assert len(denoised) == SMALL.blocks
    denoised.clear()
    once(replace(SMALL, sampler="unrolled", softmax=softmax))
    assert len(denoised) == SMALL.blocks * (1 + 5)


@pytest.mark.parametrize("softmax", [True, False])
def test_serving_denoises_the_last_row_of_the_last_block_alone(denoised: list[int], softmax: bool) -> None:
    once(replace(SERVED, softmax=softmax))
    assert denoised == [SERVED.batch] * 5
    denoised.clear()
    once(replace(SERVED, sample_blocks="all", softmax=softmax))
    assert denoised == [SERVED.batch * SERVED.max_len] * 5 + [SERVED.batch] * 5


def test_a_training_step_is_an_update() -> None:
    subject = work(replace(SMALL, attention="dot_product", form=None, sampler=None, steps=None), CPU, num_items=60)
    (given,) = subject.inputs(4)
    losses = [float(subject.run(given, draw).recommendation) for draw in range(40)]  # type: ignore[attr-defined]
    assert losses[-1] < 0.9 * losses[0]


# --- rows -------------------------------------------------------------------------------------------------------------


def test_a_ratio_is_paired_within_rounds() -> None:
    """The machine is three times slower in every second round: medians of times alone would be off by that."""
    slow = [1.0, 3.0, 1.0, 3.0, 3.0]
    control = [[0.1 * factor] * 3 for factor in slow]
    times = [[0.25 * factor] for factor in slow]
    result = row(SMALL, Alone("ok", 0.2, 5 * MIB), times, control, MACHINE)
    assert result["ratio_to_dot_product"] == pytest.approx(2.5)
    assert result["ms_per_step"] == pytest.approx(750)
    assert result["sequences_per_second"] == pytest.approx(4 / 0.75, rel=1e-3)
    assert (result["status"], result["repeats"], result["peak_memory_mb"]) == ("ok", 5, 5.0)


def test_one_slow_turn_of_the_dot_product_does_not_move_a_ratio() -> None:
    result = row(SMALL, Alone("ok", 0.2, MIB), [[0.2]] * 5, [[0.1, 9.0, 0.1]] * 5, MACHINE)
    assert result["ratio_to_dot_product"] == pytest.approx(2.0)


def test_rows_that_were_not_repeated_or_not_run_say_so() -> None:
    long = row(SMALL, Alone("ok", 4.0, MIB), [], [[0.1]] * 5, MACHINE)
    assert (long["status"], long["ms_per_step"], long["ratio_to_dot_product"]) == ("time_limit", 4000, 40)
    assert "not paired" in long["note"]
    full = row(SMALL, Alone("out_of_memory", note="would take 9 GiB"), [], [[0.1]] * 5, MACHINE)
    assert full["status"] == "out_of_memory"
    assert full["ms_per_step"] is full["ratio_to_dot_product"] is full["peak_memory_mb"] is None
    assert full.keys() - {"note"} == row(SMALL, Alone("ok", 1, 1), [[1.0]] * 5, [[1.0]] * 5, MACHINE).keys()


def test_the_file_is_whole_after_every_cell(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "rows.json"
    content = {"command": "x", "targets": [], "rows": [{"a": 1}, {"a": None}]}
    for known in (0, 1, 2):
        write({**content, "rows": content["rows"][:known]}, out)
        assert json.loads(out.read_text())["rows"] == content["rows"][:known]
    assert [path.name for path in out.parent.iterdir()] == ["rows.json"]
    with pytest.raises(GenattError, match="choose another --out"):
        write(content, out / "below_a_file.json")


def invented(seconds: float = 0.001) -> list[dict[str, Any]]:
    """Rows of the whole grid in which only unrolled training grows with T, and T = 200 does not fit."""
    rows = []
    for variant in FULL:
        factor = 1 if variant.attention == "dot_product" else 1.05
        factor *= variant.steps if variant.sampler == "unrolled" and variant.steps else 1
        alone = Alone("ok", seconds * factor, MIB)
        times = [[seconds * factor]] * LEAST_REPEATS
        if variant.sampler == "unrolled" and variant.steps == 200:
            alone, times = Alone("out_of_memory", note="too large"), []
        rows.append(row(variant, alone, times, [[seconds]] * LEAST_REPEATS, MACHINE))
    return rows


def test_targets_are_judged_by_their_own_rows() -> None:
    rows = invented()
    judged = targets.judge(rows)
    assert len(judged) == len(targets.TARGETS)
    assert all(one["met"] for one in judged)
    for one in rows:
        if (one["mode"], one["sampler"], one["steps"], one["sample_blocks"]) == ("serving", "ddim", 50, "last"):
            one["ratio_to_dot_product"] = 1.81
    assert [one["what"] for one in targets.judge(rows) if not one["met"]] == [
        "serving, 2 blocks, sample_blocks=last, S=50"
    ]
    for change in ({"status": "time_limit"}, {"threads": 1}, {"device": "NVIDIA H100"}):
        assert targets.judge([one | change for one in rows]) == []
    assert targets.judge(rows, num_items=60) == []


def test_figures_have_a_line_for_each_way_and_no_point_for_what_did_not_fit(tmp_path: Path) -> None:
    rows = invented()
    figures = steps_plots(rows)
    titles = [figure.title for figure in figures]
    assert len(set(titles)) == len(titles)
    assert {f"n = {max_len}" in title for max_len in MAX_LENS for title in titles} == {True, False}
    figure = figures[0]
    lines = {trace["name"]: trace for trace in figure.traces}
    assert len(lines) == 7  # dot product, V-GenAtt in two forms, D-GenAtt in two forms by two samplers
    assert lines["D-GenAtt, factor, one step"]["x"] == list(STEPS)
    assert lines["D-GenAtt, factor, unrolled"]["x"] == list(STEPS[:-1])
    assert figure.layout["xaxis"]["type"] == figure.layout["yaxis"]["type"] == "log"
    json.dumps([[figure.traces, figure.layout] for figure in figures])
    assert draw([one for one in rows if one["mode"] == "training" and one["max_len"] == 200], tmp_path / "steps.png")
    assert (tmp_path / "steps.png").read_bytes().startswith(b"\x89PNG")
    assert steps_plots([]) == []


# --- processes --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def worker_environment() -> Iterator[None]:
    with environment():
        yield


@pytest.mark.slow
@pytest.mark.usefixtures("worker_environment")
class TestChild:
    def test_memory_is_what_a_step_takes_and_grows_with_t(self) -> None:
        peaks = []
        for steps in (10, 40):
            with Child(60) as child:
                variant = replace(SMALL, sampler="unrolled", steps=steps, max_len=50, batch=64)
                found = child.ask("alone", variant, Limits(None, 60))
            assert found.status == "ok"
            peaks.append(found.peak_bytes)
        # At least d_h = 128 floats a token, block and step have to be kept for the backward pass.
        assert peaks[1] - peaks[0] > 30 * 2 * 64 * 50 * 128 * 4

    def test_a_variant_that_would_not_fit_is_not_run(self) -> None:
        with Child(60) as child:
            variant = replace(SMALL, sampler="unrolled", steps=100, max_len=50, batch=64)
            found = child.ask("alone", variant, Limits(160 * MIB, 60))
        assert found.status == "out_of_memory"
        assert found.seconds is None
        assert "of the 160 MiB it may take" in found.note

    def test_memory_that_runs_out_in_the_middle_is_an_answer(self) -> None:
        """The limit alone, without the forecast: even the first small step does not fit."""
        variant = replace(SMALL, sampler="unrolled", steps=100, max_len=50, batch=512)
        with Child(60) as child, pytest.raises(NoMemoryError, match="allocate memory"):
            child.ask("alone", variant, Limits(8 * MIB, 60))

    def test_a_killed_process_counts_as_out_of_memory(self) -> None:
        with Child(60) as child:
            os.kill(child.pid, signal.SIGKILL)
            with pytest.raises(NoMemoryError, match="killed"):
                child.ask("machine")


@pytest.mark.slow
def test_the_verb_measures_and_draws(tmp_path: Path) -> None:
    out = tmp_path / "steps.json"
    extents = (
        "--quick --steps 1,2,400 --sampling-steps 1,2 --max-len 8 --training-batch 32 --serving-batch 4 --items 60"
    )
    chosen = "--select form=factor --select softmax=true --select blocks=2 --select batch=4,32 --memory-limit 90"
    arguments = [*extents.split(), *chosen.split()]
    command = [sys.executable, "-m", "benchmarks.steps", *arguments, "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    rows = result["rows"]
    words = result["command"].split()
    assert sorted(words) == sorted(["genatt", "bench", "steps", *arguments, "--out", "FILE"])
    assert str(tmp_path) not in out.read_text()
    issue = {
        "mode", "attention", "form", "sampler", "steps", "max_len", "batch", "ms_per_step", "sequences_per_second",
        "peak_memory_mb", "ratio_to_dot_product", "device", "versions",
    }  # fmt: skip
    assert all(issue <= one.keys() for one in rows)
    lost = [one for one in rows if one["status"] == "out_of_memory"]
    assert {(one["sampler"], one["steps"]) for one in lost} == {("unrolled", 400)}
    for one in rows:
        if one["status"] == "ok":
            assert one["repeats"] >= LEAST_REPEATS
            assert one["ms_p10"] <= one["ms_per_step"] <= one["ms_p90"]
            assert one["ratio_to_dot_product"] > 0
    assert out.with_suffix(".png").is_file()
