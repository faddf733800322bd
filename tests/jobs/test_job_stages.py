"""A stage whose result is there is skipped, one of another configuration is refused, and what a killed attempt left of
itself is cleared; without a cluster.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from in_process import without_ray
from tiny_data import run_tree

from data_pipeline.config import PrepareConfig
from data_pipeline.errors import GenattError, ResumableError
from data_pipeline.storage import write_bytes
from genatt_dist import runs
from genatt_dist.config import RunConfig
from genatt_dist.launch import ray_train
from genatt_dist.training.checkpoint.files import read_if_there
from jobs import driver, evaluate, options, pipeline, prepare


def config(**changes: Any) -> PrepareConfig:
    small = {"min_user_interactions": 1, "min_item_interactions": 1, "num_shards": 2}
    place = f"memory://{uuid4()}/shards"  # not a local directory, so nothing can be renamed
    source = "synthetic:users=30,items=20,rows=300"
    return PrepareConfig.model_validate({"source": source, "out": place, **small, **changes})


@pytest.fixture(autouse=True)
def _in_process() -> Any:
    with without_ray():
        yield


def test_shards_of_the_same_configuration_are_made_once() -> None:
    wanted = config()
    assert prepare.already(wanted) is None
    assert prepare.prepare(wanted, wanted.out) == prepare.already(wanted)
    assert "30 users, 20 items, 300 interactions" in str(prepare.already(wanted))
    with pytest.raises(GenattError, match="holds shards of another configuration: choose another place, or remove it"):
        prepare.already(wanted.model_copy(update={"seed": 1}))
    with pytest.raises(GenattError, match="holds shards of another configuration"):
        prepare.already(wanted.model_copy(update={"source": "synthetic:users=31,items=20,rows=300"}))


def test_what_a_killed_attempt_left_is_cleared_and_nothing_else() -> None:
    wanted = config()
    write_bytes(f"{wanted.out}/_preparing-0123", b"")
    with pytest.raises(GenattError, match=r"another preparation writes there.*another prepare.out, or remove it"):
        prepare.prepare(wanted, "runs/a")
    assert read_if_there(f"{wanted.out}/_preparing-0123") == b""
    write_bytes(f"{wanted.out}.preparing.json", b'{"run": "runs/a"}')
    with pytest.raises(GenattError, match="the job of run runs/a prepares there, or was ended in it"):
        prepare.prepare(wanted, "runs/b")
    assert read_if_there(f"{wanted.out}/_preparing-0123") == b""
    assert "30 users" in prepare.prepare(wanted, "runs/a")
    assert read_if_there(f"{wanted.out}/_preparing-0123") is None
    assert read_if_there(f"{wanted.out}.preparing.json") is None


def test_a_stage_is_a_line_at_its_begin_and_one_at_its_end(capsys: pytest.CaptureFixture[str]) -> None:
    driver.stage("one", lambda: None, lambda: "made")
    driver.stage("two", lambda: "there", lambda: pytest.fail("it was there"))
    begun, done, skipped = capsys.readouterr().out.splitlines()
    assert begun == "one: starts"
    assert done.startswith("one: done in 0.0 s: made")
    assert skipped == "two: skipped: there"


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (GenattError("no such key"), 2, "error: no such key"),
        (ResumableError("stopped"), 75, "error: stopped"),
        (KeyboardInterrupt(), 75, "error: the job was stopped: submit it again and it goes on"),
    ],
)
def test_an_entry_point_ends_as_the_program_does(
    error: BaseException,
    code: int,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "job.yaml").write_text("{run: x, config: {}}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["jobs.train"])
    monkeypatch.setattr(driver.signal, "signal", lambda *_: None)
    monkeypatch.delenv("RAY_OVERRIDE_JOB_RUNTIME_ENV", raising=False)

    def work(config: dict[str, Any], run: str) -> None:
        raise error

    with pytest.raises(SystemExit) as ended:
        driver.main(work, "")
    assert ended.value.code == code
    assert capsys.readouterr().err == f"{said}\n"


@pytest.mark.slow
def test_a_pipeline_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the ranks in a process of their own in place of Ray Train's, and evaluation in this one."""
    run = str(tmp_path / "runs" / "a")
    trained: list[bool] = []

    def fit(config: RunConfig, place: Path, resume: bool | None, storage: str | None) -> dict[str, Any]:
        trained.append(bool((place / "checkpoints").exists()))
        if not trained[-1]:
            (place / runs.CONFIG).unlink()
            place.rmdir()
        return runs.train(config, place, "process", resume=trained[-1])

    monkeypatch.setattr(ray_train, "fit", fit)
    monkeypatch.setattr(evaluate, "on_node", lambda what, place, work, *arguments: work(*arguments))
    tree = run_tree("-")
    del tree["data"]["path"]
    sections = {
        "prepare": {"source": "synthetic:users=60,items=40,rows=900", "num_shards": 2, "min_item_interactions": 1},
        "train": tree,
    }

    def lines(*overrides: str) -> list[str]:
        config = tmp_path / "pipeline.yaml"
        config.write_text(options.yaml.safe_dump(sections))
        pipeline.work(options.load("pipeline", config, overrides, run), run)
        told = [line.split(": ") for line in capsys.readouterr().out.splitlines()]
        return [f"{one[0]} {one[1].split()[0]}" for one in told if one[0] in sections | {"evaluate": 0, "report": 0}]

    stages = ("prepare", "train", "evaluate", "report")
    assert lines() == [f"{stage} {word}" for stage in stages for word in ("starts", "done")]
    assert lines() == [f"{stage} skipped" for stage in stages]
    (tmp_path / "runs" / "a" / "evaluation-test.json").unlink()
    evaluated = ["prepare skipped", "train skipped", "evaluate starts", "evaluate done"]
    assert lines() == [*evaluated, "report skipped"]
    (tmp_path / "runs" / "a" / "summary.json").unlink()
    assert lines()[:3] == ["prepare skipped", "train starts", "train done"]
    with pytest.raises(GenattError, match=r"model\.hidden_size was 16, is 32"):
        lines("train.model.hidden_size=32")
    assert runs.read_config(Path(run)).model.hidden_size == 16
    assert trained == [False, True]
