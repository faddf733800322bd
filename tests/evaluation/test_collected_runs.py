"""`genatt report`: evaluated runs under one protocol, or one line that says what is missing."""

import json
import shutil
import sys
from pathlib import Path

import pytest

from data_pipeline.errors import GenattError
from genatt_dist import cli
from genatt_dist.evaluation.collect import collect
from genatt_dist.evaluation.report import write_report
from genatt_dist.evaluation.run import evaluate_run


@pytest.fixture(scope="module")
def evaluated(trained_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tiny run that is evaluated on test."""
    run = tmp_path_factory.mktemp("evaluated") / "one"
    shutil.copytree(trained_run, run)
    evaluate_run(run, "test")
    return run


def changed(run: Path, to: Path, **changes: object) -> Path:
    """A copy of the run whose evaluation says something else; sections are merged."""
    shutil.copytree(run, to)
    file = to / "evaluation-test.json"
    content = json.loads(file.read_text())
    for key, value in changes.items():
        content[key] = content[key] | value if isinstance(value, dict) else value
    file.write_text(json.dumps(content))
    return to


def test_a_report_holds_what_training_and_evaluation_wrote(evaluated: Path, tmp_path: Path) -> None:
    report, named = collect([evaluated])
    evaluation = json.loads((evaluated / "evaluation-test.json").read_text())
    assert named == {"dot_product": evaluated}
    assert report["dataset"] == {
        "name": "tiny",
        "users": 48,
        "items": 40,
        "interactions": report["dataset"]["interactions"],
    }
    assert report["protocol"] == evaluation["protocol"]
    (model,) = report["models"]
    assert model["test"] == {name: value for name, value in evaluation["metrics"].items() if "/" not in name}
    assert model["train"]["epochs"] == 2
    assert model["seed"] == 0
    assert not any("/" in name for name in model["valid"])
    write_report(report, named, tmp_path)
    assert "Attention maps of some users" in (tmp_path / "report.html").read_text()


def test_the_verb_writes_the_page_or_one_line(
    evaluated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def genatt(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["genatt", "report", *map(str, words)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        out, err = capfd.readouterr()
        return int(caught.value.code or 0), out, err

    code, out, err = genatt(evaluated, "--out", tmp_path / "report")
    assert (code, err) == (0, "")
    assert f"Report: {tmp_path / 'report' / 'report.html'}" in out
    assert {file.name for file in (tmp_path / "report").iterdir()} == {"report.html", "report.json"}
    code, out, err = genatt(evaluated, "--out", tmp_path / "report" / "report.json")
    assert (code, out) == (2, "")
    assert err == f"error: cannot write {tmp_path / 'report' / 'report.json'}: File exists; choose another --out\n"


def test_models_are_called_by_type_or_where_types_repeat_by_directory(evaluated: Path, tmp_path: Path) -> None:
    other = changed(evaluated, tmp_path / "gen", model="variational")
    assert list(collect([evaluated, other])[1]) == ["dot_product", "variational"]
    twice = changed(evaluated, tmp_path / "two")
    assert list(collect([evaluated, twice])[1]) == ["one", "two"]
    (tmp_path / "elsewhere").mkdir()
    again = changed(evaluated, tmp_path / "elsewhere" / "one")
    with pytest.raises(GenattError, match="2 runs are called one: name runs whose directories have different names"):
        collect([evaluated, again])


def test_protocols_may_differ_in_what_belongs_to_the_model(evaluated: Path, tmp_path: Path) -> None:
    other = changed(evaluated, tmp_path / "gen", model="variational", protocol={"max_len": 99})
    assert collect([evaluated, other])[0]["protocol"]["max_len"] == "8 (dot_product), 99 (variational)"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"protocol": {"exclude_seen": False}}, "were evaluated differently: exclude_seen is True and False"),
        ({"dataset": {"manifest_hash": "0" * 64}}, "are of different data"),
    ],
)
def test_what_cannot_stand_in_one_table_is_refused(
    changes: dict[str, object], message: str, evaluated: Path, tmp_path: Path
) -> None:
    with pytest.raises(GenattError, match=f"{message}.*give each a report of its own"):
        collect([evaluated, changed(evaluated, tmp_path / "other", **changes)])


def test_a_run_that_is_not_evaluated_is_told_the_command(evaluated: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(evaluated, run)
    content = json.loads((run / "evaluation-test.json").read_text())
    del content["dataset"]  # as an older program wrote it
    (run / "evaluation-test.json").write_text(json.dumps(content))
    with pytest.raises(GenattError, match=f"run `genatt evaluate {run} --split test` again"):
        collect([run])
    (run / "evaluation-test.json").unlink()
    with pytest.raises(GenattError, match=f"{run} is not evaluated on test.*run `genatt evaluate {run} --split test`"):
        collect([run])
    with pytest.raises(GenattError, match="is not a run directory"):
        collect([tmp_path])


def test_a_run_that_was_not_trained_to_its_end_is_refused(evaluated: Path, tmp_path: Path) -> None:
    run = changed(evaluated, tmp_path / "run")
    (run / "summary.json").unlink()
    with pytest.raises(GenattError, match=r"no summary\.json in it.*--resume"):
        collect([run])


@pytest.mark.parametrize("key", ["model", "protocol", "metrics", "dataset"])
def test_an_evaluation_that_lacks_a_part_is_one_line(evaluated: Path, tmp_path: Path, key: str) -> None:
    run = changed(evaluated, tmp_path / "run")
    content = json.loads((run / "evaluation-test.json").read_text())
    del content[key]
    (run / "evaluation-test.json").write_text(json.dumps(content))
    with pytest.raises(GenattError, match=f"evaluation-test.json has no {key}: run `genatt evaluate"):
        collect([evaluated, run])


def steps_row() -> dict[str, object]:
    """A row as `genatt bench steps` writes it."""
    return {
        "mode": "training", "attention": "dot_product", "form": None, "sampler": None, "steps": None, "max_len": 50,
        "batch": 256, "lengths": "all_n", "softmax": True, "blocks": 2, "sample_blocks": None, "status": "ok",
        "ms_per_step": 12.5, "ratio_to_dot_product": 1.0,
    }  # fmt: skip


def test_rows_of_steps_are_read_from_a_list_or_under_their_name(evaluated: Path, tmp_path: Path) -> None:
    rows = [steps_row()]
    for content in (rows, {"versions": {}, "rows": rows}):
        (tmp_path / "steps.json").write_text(json.dumps(content))
        assert collect([evaluated], tmp_path / "steps.json")[0]["steps"] == rows
    strange = [
        ('[{"loss": 1.5}]', r"row 1 is none of `genatt bench steps` \(its attention is missing\)"),
        (json.dumps([*rows, {**rows[0], "batch": None}]), r"row 2 is none .*\(its batch is None\)"),
    ]
    for text, message in (("{}", "holds no rows"), ("nonsense", "is not JSON"), *strange):
        (tmp_path / "steps.json").write_text(text)
        with pytest.raises(GenattError, match=message):
            collect([evaluated], tmp_path / "steps.json")
    with pytest.raises(GenattError, match=r"cannot read --steps .*gone\.json: No such file"):
        collect([evaluated], tmp_path / "gone.json")
