"""`genatt bench scaling`: the grid holds what is promised, rows say what was measured, failures are rows."""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from benchmarks.scaling import measure, ray_workers
from benchmarks.scaling.breakdown import PARTS, part, shares
from benchmarks.scaling.draw import draw
from benchmarks.scaling.extrapolate import MARK
from benchmarks.scaling.grid import (
    HELD_OUT_ITEMS,
    HELD_OUT_STEPS,
    QUICK,
    Cell,
    ScalingConfig,
    Spec,
    held_out,
    read,
    select,
)
from benchmarks.scaling.growth import COLUMNS, growth, markdown
from benchmarks.scaling.judge import ALONE, FITTED, TOGETHER, judged, modelled, read_results
from benchmarks.scaling.measure import WAITING, Measured, measured_cell, parts, rows_of, too_large
from benchmarks.scaling.model import deviation, lead
from benchmarks.scaling.pool import Pool, RowError
from benchmarks.scaling.run import again, command, finish, run
from benchmarks.scaling.work import measure_rank
from data_pipeline.errors import GenattError
from genatt_dist.training.timing import SECTIONS

FULL = ScalingConfig()
TINY: dict[str, Any] = {"max_len": 6, "width": 8, "batch": 4, "rounds": 2, "turn_seconds": 0.01, "warmup": 1}
SILENT = Console(quiet=True)


# --- grid -------------------------------------------------------------------------------------------------------------


def test_the_grid_crosses_t_catalogues_and_tables() -> None:
    found = {(cell.steps, cell.items, cell.table) for cell in FULL.cells if cell.loss == "sampled"}
    for steps in (None, 1, 10, 50, 200):
        for items in (10_000, 100_000):
            assert {(steps, items, "replicated"), (steps, items, "sharded")} <= found
    assert {(None, 1_000_000, "sharded"), (50, 1_000_000, "replicated")} <= found
    assert {cell.items for cell in FULL.cells if cell.loss == "full"} == {10_000, 30_000}


@pytest.mark.parametrize("config", [FULL, read(None, QUICK), ScalingConfig(ranks=(1, 2, 4))])
def test_every_row_has_what_it_is_compared_with(config: ScalingConfig) -> None:
    for cell in config.cells:
        rows = config.rows(cell)
        assert len(set(rows)) == len(rows)
        for spec in rows:
            assert spec.cell == cell
            if spec.world_size > 1:
                single = spec.model_copy(update={"ranks": 1})
                alone = spec.model_copy(update={"batch": spec.batch // spec.ranks, "independent": True})
                assert single in rows or alone in rows
        for ranks_ in config.ranks:
            assert Spec(**cell.model_dump(), ranks=ranks_, batch=config.batch * ranks_) in rows
            assert Spec(**cell.model_dump(), ranks=ranks_, batch=config.batch * max(config.ranks)) in rows


def test_rows_are_fitted_to_or_held_out_and_both_are_many() -> None:
    specs = [spec for cell in FULL.cells for spec in FULL.rows(cell)]
    fitted = [spec for spec in specs if not held_out(spec, FULL.batch)]
    assert {spec.ranks for spec in fitted} == set(FULL.ranks)
    assert {spec.batch for spec in fitted} == {FULL.batch, FULL.batch // 4}
    for spec in fitted:
        assert spec.world_size == 1
        assert spec.steps not in HELD_OUT_STEPS
        assert spec.items not in HELD_OUT_ITEMS
    held = [spec for spec in specs if held_out(spec, FULL.batch)]
    assert len(held) > len(fitted) > 40
    assert {spec.steps for spec in held} > set(HELD_OUT_STEPS)
    assert {spec.items for spec in held} > set(HELD_OUT_ITEMS)


def test_every_row_is_a_configuration_of_the_product() -> None:
    for cell in FULL.cells:
        for spec in FULL.rows(cell):
            config = spec.config
            assert config.world_size == spec.world_size
            assert config.training.batch_sequences == spec.batch
            assert config.table.kind == spec.table


def test_filters_keep_cells_and_name_what_is_wrong() -> None:
    assert {cell.table for cell in select(FULL.cells, ["table=sharded", "steps=none,50"])} == {"sharded"}
    with pytest.raises(GenattError, match="did you mean table"):
        select(FULL.cells, ["tabel=sharded"])
    with pytest.raises(GenattError, match="no cell of the grid has steps=7: use"):
        select(FULL.cells, ["steps=7"])
    with pytest.raises(GenattError, match="leaves nothing"):
        select(FULL.cells, ["loss=full", "items=1000000"])


def test_a_configuration_is_read_strictly(tmp_path: Path) -> None:
    path = tmp_path / "scaling.yaml"
    path.write_text("ranks: [1, 2]\nsteps: [50]\nlauncher: ray\n")
    assert read(path, {"steps": "1,10"}) == ScalingConfig(ranks=(1, 2), steps=(1, 10), launcher="ray")
    for text, error in (
        ("rank: [1]", "unknown key rank: did you mean ranks"),
        ("ranks: 2,4", "ranks=2,4: ratios are over one rank; add 1"),
        ("steps: [0]", "whole numbers from 1"),
        ("mode: fast", "mode"),
        ("qqq: 1\nzzz: 2\nrank: 1", "unknown key rank: did you mean ranks.; unknown keys qqq, zzz: known: ranks, "),
        ("- 1", "holds list"),
        ("a: [", "not valid YAML"),
    ):
        path.write_text(text)
        with pytest.raises(GenattError, match=error) as caught:
            read(path, {})
        assert "\n" not in str(caught.value)
        assert str(caught.value).count("known: ") <= 1
    with pytest.raises(GenattError, match="cannot read"):
        read(tmp_path / "none.yaml", {})


def test_the_command_says_what_is_not_the_default() -> None:
    assert command(FULL) == "genatt bench scaling --out FILE"
    assert command(read(None, {"full_items": "none"})) == "genatt bench scaling --full-items none --out FILE"
    config = ScalingConfig(steps=(1, 50), select=("table=sharded",), launcher="deepspeed")
    assert command(config) == "genatt bench scaling --steps 1,50 --select table=sharded --launcher deepspeed --out FILE"


def test_help_imports_no_torch() -> None:
    code = "import sys; import benchmarks.scaling.grid; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0


# --- what is made of the measurements ---------------------------------------------------------------------------------


def _measured(spec: Spec, *rounds: float) -> Measured:
    one = Measured(spec)
    one.rounds, one.steps = list(rounds), list(rounds)
    one.machine = {"device": "cpu", "threads_a_rank": 1}
    return one


def test_ratios_are_taken_within_a_round() -> None:
    single, alone = (
        _measured(Spec(batch=8), 1.0, 2.0, 4.0),
        _measured(Spec(batch=8, ranks=2, independent=True), 1, 2, 4),
    )
    whole, two = _measured(Spec(batch=16), 2.0, 4.0, 8.0), _measured(Spec(batch=16, ranks=2), 1.25, 2.5, 5.0)
    rows = rows_of([single, alone, whole, two])
    assert rows[1]["weak_efficiency"] == 1
    assert rows[3]["weak_efficiency"] == pytest.approx(0.8)
    assert rows[3]["of_ceiling"] == pytest.approx(0.8)
    assert rows[3]["strong_speedup"] == pytest.approx(1.6)
    assert rows[3]["tokens_per_second"] == pytest.approx(16 * 50 / 2.5)
    assert rows[1]["tokens_per_second"] == pytest.approx(2 * 8 * 50 / 2.0)
    assert [(one["met"], one["of_ceiling"]) for one in judged(rows)] == [(False, pytest.approx(0.8))]


def test_a_row_without_its_comparison_has_none() -> None:
    failed = _measured(Spec(batch=8))
    failed.status, failed.note, failed.rounds = "out_of_memory", "no room", []
    rows = rows_of([failed, _measured(Spec(batch=16, ranks=2), 1.0)])
    assert (rows[0]["status"], rows[0]["ms_per_step"], rows[0]["note"]) == ("out_of_memory", None, "no room")
    assert rows[1]["weak_efficiency"] is None
    assert judged(rows) == []


def test_what_the_quicker_rank_did_not_wait_is_the_exchange() -> None:
    ranks_ = [{"ZeRO communication": 0.1, "dense forward": 0.9}, {"ZeRO communication": 0.3, "dense forward": 0.7}]
    found = parts([dict.fromkeys(PARTS, 0.0) | each for each in ranks_])
    assert found["ZeRO communication"] == 0.1
    assert found[WAITING] == pytest.approx(0.1)
    assert sum(found.values()) == pytest.approx(1)


@pytest.mark.parametrize(
    ("path", "of_loss", "expected"),
    [
        (["queue", "input"], False, "input"),
        (["c10d::alltoall_base_", "## kjt ##", "lookup"], False, "id exchange"),
        (["wait for ranks", "All2All_Seq_ReqBackward", "backward"], False, "id exchange"),
        (["fbgemm::split_embedding", "backward"], False, "lookup"),
        (["aten::mm", "forward"], False, "dense forward"),
        (["aten::mm", "MmBackward0", "backward"], False, "dense backward"),
        (["aten::mm", "MmBackward0", "backward"], True, "softmax"),
        (["aten::mm", "_FullLoss", "loss", "forward"], False, "softmax"),
        (["wait for ranks", "_FullLoss", "loss", "forward"], False, "softmax exchange"),
        (["c10d::allreduce_", "backward"], False, "ZeRO communication"),
        (["wait for ranks", "optimizer"], False, "ZeRO communication"),
        (["wait for ranks", "forward"], False, "sums over ranks"),
        (["aten::_fused_adamw_", "optimizer"], False, "optimizer"),
        (["aten::stack"], False, "other"),
    ],
)
def test_every_operation_is_in_the_part_it_is_of(path: list[str], of_loss: bool, expected: str) -> None:
    assert part(path, of_loss) == expected


class _Event:
    def __init__(self, name: str, self_time: float, parent: _Event | None = None, number: int = -1, thread: int = 1):
        self.name, self.self_cpu_time_total, self.cpu_parent = name, self_time, parent
        self.sequence_nr, self.thread = number, thread


def test_the_gradient_of_the_loss_is_found_by_its_number() -> None:
    forward, backward = _Event("forward", 0), _Event("backward", 0)
    loss = _Event("loss", 0, forward)
    scored = _Event("aten::mm", 1, loss, number=7)
    node = _Event("autograd::engine::evaluate_function: MmBackward0", 0, backward, number=7)
    other = _Event("autograd::engine::evaluate_function: MmBackward0", 0, backward, number=8)
    work = [_Event("aten::mm", 2, node), _Event("aten::mm", 4, other), _Event("gloo:all_reduce", 50, thread=2)]
    found = shares([forward, backward, loss, scored, node, other, *work])
    assert found["softmax"] == pytest.approx(3 / 7)
    assert found["dense backward"] == pytest.approx(4 / 7)


def _synthetic(config: ScalingConfig) -> tuple[list[dict[str, Any]], dict[str, list[dict[str, Any]]]]:
    """Rows that take what known weights and links say."""
    import numpy as np

    from benchmarks.scaling import features
    from benchmarks.scaling.collectives import KINDS
    from benchmarks.scaling.model import Line
    from benchmarks.scaling.model import Measured as Links

    weights = {1: np.array([1e-10, 2e-10, 5e-6, 3e-10, 1e-10, 1e-9])}
    weights[2] = 1.3 * weights[1]
    links = Links(2, {kind: Line(2e-4, 1e-9) for kind in KINDS})
    rows = []
    for cell in config.cells:
        found = []
        for spec in config.rows(cell):
            work = features.work(spec)
            seconds = float(work.amounts @ weights[spec.ranks])
            seconds += sum(work.exchanged(links).values()) if spec.world_size > 1 else 0.0
            found.append(_measured(spec, seconds, seconds))
            found[-1].parts = [dict.fromkeys(PARTS, 1 / len(PARTS))] * spec.ranks
        rows += rows_of(found)
    timed = [{"kind": k, "bytes": size, "seconds": 2e-4 + 1e-9 * size} for k in KINDS for size in (1e3, 1e5, 1e7)]
    return rows, {"2": timed}


def test_a_model_fitted_to_some_rows_meets_those_it_never_saw() -> None:
    config = read(None, TINY | {"steps": "1,10", "items": "300", "full_items": [], "batch": 16})
    rows, timed = _synthetic(config)
    found = modelled(rows, timed, config)
    assert found["met"]
    assert found["errors"][ALONE]["largest"] < 0.05
    assert found["errors"][TOGETHER]["largest"] < 0.05
    assert {row["split"] for row in rows} == {FITTED, ALONE, TOGETHER}
    assert {row["split"] for row in rows if row["ranks"] == 2 and not row["independent"]} == {TOGETHER}
    assert found["alpha_beta"]["2"]["all_reduce"]["alpha"] == pytest.approx(2e-4)


def test_rows_of_several_ranks_are_told_beside_what_one_rank_takes() -> None:
    config = read(None, TINY | {"steps": "1,10", "items": "300", "full_items": [], "batch": 16})
    rows, timed = _synthetic(config)
    told = modelled(rows, timed, config)["errors"][TOGETHER]
    several = [row for row in rows if row["split"] == TOGETHER]
    single = {(row["steps"], row["table"]): row for row in rows if row["ranks"] == 1 and row["batch"] == 16}
    for row in several:
        one = single[row["steps"], row["table"]]
        assert row["null_error"] == pytest.approx(one["ms_per_step"] / row["ms_per_step"] - 1, abs=1e-4)
        assert row["model_weak_efficiency"] == pytest.approx(one["model_ms"] / row["model_ms"], abs=1e-4)
    assert told["rows"] == told["null_model"]["rows"] == told["weak_efficiency"]["cells"] == len(several) == 6
    assert told["null_model"]["median"] > 0.2  # two busy cores are 1.3 times as slow here
    assert told["bias"] == pytest.approx(sum(row["model_error"] for row in several) / 6, abs=1e-4)
    assert told["weak_efficiency"]["loss_explained"] == pytest.approx(1, abs=0.1)


def test_the_slowest_of_ranks_leads_by_what_is_known() -> None:
    """Of two and three normal variables: 1/√π and 3/(2√π)."""
    assert lead(1) == 0
    assert lead(2) == pytest.approx(1 / math.sqrt(math.pi), abs=1e-3)
    assert lead(3) == pytest.approx(1.5 / math.sqrt(math.pi), abs=1e-3)


def test_waiting_is_what_steps_of_independent_processes_vary() -> None:
    """Two processes whose mean has a tenth between its tenths: each varies √2 times as much."""
    rows = [{"ranks": 2, "ms_per_step": 100.0, "ms_p10": 95.0, "ms_p90": 105.0}]
    assert deviation(rows) == pytest.approx(math.sqrt(2) * 0.1 / 2.5631, rel=1e-4)
    assert deviation([rows[0] | {"ms_p10": None, "ms_p90": None}]) == 0
    config = read(None, TINY | {"steps": "1,10", "items": "300", "full_items": [], "batch": 16})
    rows, timed = _synthetic(config)
    modelled(rows, timed, config)
    assert {row["model_waiting_ms"] for row in rows if row["split"] == TOGETHER} == {0}
    for row in rows:
        if row["independent"]:
            row |= {"ms_p10": 0.9 * row["ms_per_step"], "ms_p90": 1.1 * row["ms_per_step"]}
    found = modelled(rows, timed, config)
    assert found["deviation_of_a_step"]["2"] == pytest.approx(math.sqrt(2) * 0.2 / 2.5631, rel=1e-3)
    for row in rows:
        if row["split"] == TOGETHER:
            assert row["model_error"] > row["unwaited_error"] + 0.03
            assert row["model_waiting_ms"] / row["model_ms"] < 0.2 / 2.5631 * math.sqrt(2 / math.pi)


@pytest.mark.parametrize("some", [{"steps": "10", "select": ("steps=10",)}, {"steps": "1", "select": ("steps=1",)}])
def test_with_fewer_rows_than_weights_there_is_no_model_and_it_says_so(some: dict[str, Any]) -> None:
    config = read(None, TINY | some | {"items": "300", "full_items": [], "batch": 16, "tables": "sharded"})
    rows, timed = _synthetic(config)
    assert "not fitted: " in modelled(rows, timed, config)["note"]
    assert not any("model_ms" in row for row in rows)


def test_rows_are_judged_again_and_by_the_model_of_another_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.scaling.draw.draw", lambda *_: [])  # seconds a figure
    monkeypatch.setattr("benchmarks.scaling.extrapolate.extrapolated", lambda *_: {})
    config = read(None, TINY | {"steps": "1,10", "items": "300", "full_items": [], "batch": 16})
    rows, timed = _synthetic(config)
    whole = {"command": command(config), "config": config.model_dump(mode="json"), "collectives": timed, "rows": rows}
    first = tmp_path / "whole.json"
    finish(whole, config, first, SILENT)
    again(first, tmp_path / "again.json", SILENT)
    assert (tmp_path / "again.json").read_text() == first.read_text()

    some = read(None, TINY | {"steps": "10", "items": "300", "full_items": [], "batch": 16, "mode": "weak"})
    few, _ = _synthetic(some)
    result = {"config": some.model_dump(mode="json"), "collectives": timed, "rows": few}
    second = tmp_path / "few.json"
    finish(result, some, second, SILENT)
    judged_by = again(second, tmp_path / "judged.json", SILENT, first)["model"]
    assert judged_by["fitted_in"] == "whole.json"
    assert FITTED not in judged_by["errors"]
    assert judged_by["errors"][TOGETHER]["largest"] < 0.05
    assert judged_by["seconds_of_one"] == json.loads(first.read_text())["model"]["seconds_of_one"]


def test_what_cannot_be_judged_again_is_named(tmp_path: Path) -> None:
    path, config = tmp_path / "a.json", read(None, TINY | {"steps": "10", "items": "300", "full_items": []})
    with pytest.raises(GenattError, match="cannot read"):
        again(path, tmp_path / "b.json", SILENT)
    for text in ("{", "[]", '{"rows": []}', '{"config": {"a": 1}, "collectives": {}, "rows": [{}]}'):
        path.write_text(text)
        with pytest.raises(GenattError, match="holds no rows of `genatt bench scaling`"):
            again(path, tmp_path / "b.json", SILENT)
    rows = rows_of([_measured(Spec(batch=8), 1.0)])
    head = {"config": config.model_dump(mode="json"), "collectives": {}, "rows": rows}
    path.write_text(json.dumps(head | {"model": {"note": "not fitted"}}))
    with pytest.raises(GenattError, match="holds no fitted model: name the results of a larger grid"):
        run(config, tmp_path / "b.json", None, SILENT, path)
    saved = {"seconds_of_one": {}, "deviation_of_a_step": {}, "alpha_beta": {}}
    path.write_text(json.dumps(head | {"model": saved}))
    with pytest.raises(GenattError, match="not 1,2: measure it with --ranks 1,2"):
        run(config, tmp_path / "b.json", None, SILENT, path)
    assert not (tmp_path / "b.json").exists()


def test_rows_none_of_which_was_measured_end_with_a_mistake(tmp_path: Path) -> None:
    config = read(None, TINY | {"steps": "50", "items": "300", "full_items": []})
    failed = [Measured(spec) for spec in config.rows(config.cells[0])]
    for one in failed:
        one.status, one.note = "out_of_memory", "would take 9 MiB of 1 MiB"
    result = {"config": config.model_dump(mode="json"), "collectives": {}, "rows": rows_of(failed)}
    said = Console(record=True, file=open(os.devnull, "w"), width=200)  # noqa: SIM115
    with pytest.raises(
        GenattError, match=r"none of 6 rows was measured \(6 out_of_memory\), the first: would take"
    ) as no:
        finish(result, config, tmp_path / "a.json", said)
    assert no.value.exit_code == 2
    assert len(json.loads((tmp_path / "a.json").read_text())["rows"]) == 6
    assert "figures" not in said.export_text()


def test_what_more_ranks_cost_adds_up_and_is_the_readmes_table() -> None:
    assert {part for parts_ in COLUMNS.values() for part in parts_} < {*PARTS, WAITING}
    result, _ = read_results(Path("benchmarks/results/scaling.json"))
    found = growth(result["rows"])
    assert len(found) == 30
    for one in found:
        before, after = one["ms"]
        assert sum(one["more"].values()) == pytest.approx(after - before, abs=0.002 * after)
    readme = Path("README.md").read_text()
    assert markdown(result["rows"], ["steps=none,50", "items=10000,100000"]) in readme


def test_results_are_written_and_drawn(tmp_path: Path) -> None:
    config = read(None, TINY | {"steps": "1,10", "items": "300", "full_items": [], "batch": 16})
    rows, timed = _synthetic(config)
    out = tmp_path / "scaling.json"
    said = Console(record=True, file=open(os.devnull, "w"), width=200)  # noqa: SIM115
    finish(
        {"command": command(config), "config": config.model_dump(), "collectives": timed, "rows": rows},
        config,
        out,
        said,
    )
    result = json.loads(out.read_text())
    assert {"command", "collectives", "model", "weak_scaling", "extrapolation", "rows"} <= result.keys()
    assert result["extrapolation"]["mark"] == MARK
    assert {path.name for path in tmp_path.iterdir()} == {
        "scaling.json",
        *(f"scaling_{name}.png" for name in ("throughput", "breakdown", "model")),
    }
    assert "held out" in said.export_text()


def test_nothing_is_drawn_of_rows_that_failed(tmp_path: Path) -> None:
    failed = Measured(Spec())
    failed.status = "time_limit"
    assert draw({"rows": rows_of([failed]), "config": {"batch": 64}}, tmp_path / "a.json") == []


def test_a_row_that_plainly_fits_needs_no_plan_and_one_that_does_not_says_how_much() -> None:
    spec = Spec(max_len=6, width=8, items=300, batch=4)
    assert too_large(spec, 8 << 30) == ""
    assert "by `genatt plan`, of the 10 MiB" in too_large(spec, 10 << 20)


def test_figures_may_not_overwrite_rows(tmp_path: Path) -> None:
    with pytest.raises(GenattError, match="figures get that name"):
        run(FULL, tmp_path / "a.png", None, SILENT)


def test_a_ray_that_nobody_named_is_not_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda *_, **__: pytest.fail("joined one"))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(GenattError, match="RAY_ADDRESS is not set: set it"), ray_workers.connected():
        pass


def test_the_ray_that_is_joined_is_the_one_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    def refuse(address: str, **_: object) -> None:
        raise ConnectionError(f"not for you at {address}")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", refuse)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setenv("RAY_ADDRESS", address)
        said = f"cannot connect to RAY_ADDRESS={address}: not for you at {address}: see whether it runs"
        with pytest.raises(GenattError, match=said), ray_workers.connected():
            pass


# --- live -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.distributed
def test_ranks_measure_themselves_under_any_launcher() -> None:
    """`measure_rank` needs a launcher's variables and nothing else."""
    sys.path.insert(0, str(Path(__file__).parent / "distributed"))
    import ranks

    spec = Spec(max_len=6, width=8, items=300, batch=8, ranks=2, table="sharded")
    answers = ranks.run(measure_rank, 2, spec, 1, 2, 2, seconds=100)
    assert [answer["rank"] for answer in answers] == [0, 1]
    for answer in answers:
        assert len(answer["seconds"]) == 2
        assert sum(answer["parts"].values()) == pytest.approx(1)
        assert answer["parts"]["id exchange"] > 0


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    with Pool("torchrun", 2, 60.0) as pool:
        yield pool


@pytest.mark.slow
@pytest.mark.distributed
def test_rows_without_memory_or_time_are_rows_with_the_reason(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    cell = Cell(max_len=6, width=64, items=1_000_000)
    config = read(None, TINY | {"mode": "weak", "width": 64, "memory_mb": 150})
    monkeypatch.setattr(measure, "too_large", lambda *_: "")  # as if the plan had not seen it coming
    rows = measured_cell(pool, config, cell, None, lambda _: None)
    assert {row["status"] for row in rows} == {"out_of_memory"}
    assert all(row["note"] and row["ms_per_step"] is None for row in rows)
    spec = Spec(max_len=6, width=8, items=300, batch=4)
    with pool.row(spec) as row:
        row._limit = 0.01
        with pytest.raises(RowError) as caught:
            row.ask("make", spec=spec.model_dump(), memory=None)
    assert caught.value.status == "time_limit"


@pytest.mark.slow
@pytest.mark.distributed
def test_a_row_whose_process_is_killed_is_a_row_and_the_next_one_is_measured(pool: Pool) -> None:
    spec = Spec(max_len=6, width=8, items=300, batch=4, ranks=2)
    with pool.row(spec) as row:
        made = row.ask("make", spec=spec.model_dump(), memory=None)
        os.kill(made[1]["pid"], 9)
        with pytest.raises(RowError, match="the system killed the process"):
            row.ask("steps", count=1)
    with pool.row(spec) as row:
        made = row.ask("make", spec=spec.model_dump(), memory=1 << 30)
        assert [len(answer["seconds"]) for answer in row.ask("steps", count=3)] == [3, 3]
        if made[0]["cores"] and (os.cpu_count() or 1) > 1:
            assert made[0]["cores"] != made[1]["cores"]
        assert made[0]["threads"] == 1


@pytest.mark.slow
@pytest.mark.distributed
def test_the_scaling_benchmark_measures_two_ranks_and_exports_traces(tmp_path: Path) -> None:
    out, traces = tmp_path / "scaling.json", tmp_path / "traces"
    small = {"steps": "1", "items": "300", "full_items": [], "select": ("table=sharded", "attention=dot_product")}
    result = run(read(None, TINY | small), out, traces, SILENT)
    assert [row["status"] for row in result["rows"]] == ["ok"] * 6
    two = next(row for row in result["rows"] if row["ranks"] == 2 and not row["independent"])
    assert two["parts_ms"].keys() == {*PARTS, WAITING}
    assert sum(two["parts_ms"].values()) == pytest.approx(two["ms_per_step"], rel=0.01)
    assert two["weak_efficiency"] > 0
    assert two["split"] == TOGETHER
    assert "not fitted" in result["model"]["note"]
    assert json.loads(out.read_text())["rows"] == result["rows"]
    trace = json.loads(next(traces.glob("*-2-*.json")).read_text())
    assert set(SECTIONS) <= {event["name"] for event in trace["traceEvents"] if "name" in event}


@pytest.mark.exhaustive
@pytest.mark.distributed
def test_the_deepspeed_launcher_measures_the_same_rows(tmp_path: Path) -> None:
    small = {"steps": "1", "items": "300", "full_items": [], "select": ("table=sharded", "attention=dot_product")}
    result = run(read(None, TINY | small | {"launcher": "deepspeed"}), tmp_path / "a.json", None, SILENT)
    assert [row["status"] for row in result["rows"]] == ["ok"] * 6
