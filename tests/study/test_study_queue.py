"""The queue of a study: what is finished stays, what fails is told, what is stopped leaves no process behind."""

import fcntl
import json
import os
import re
import shutil
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from rich.console import Console
from tiny_data import run_tree

from data_pipeline.errors import GenattError
from genatt_dist import config as configuration
from genatt_dist.launch.limits import available_cores
from genatt_dist.study import arm, plan, queue
from genatt_dist.study.paths import finished
from genatt_dist.study.plan import Study
from genatt_dist.study.run import quality


@pytest.fixture(autouse=True)
def fake_arms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queue, "_ARM", "fake_arm")
    monkeypatch.setattr(queue, "_POLL_SECONDS", 0.02)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)


@pytest.fixture
def study(prepared: Path) -> Study:
    """Three arms and one that needs the first two."""
    noisy = {"overrides": _attention("noisy_dot_product"), "match_noise": {"weights": "a", "target": "b"}}
    arms: dict[str, Any] = {"a": {}, "b": {"overrides": _attention("variational")}, "c": {}, "noisy": noisy}
    return Study.model_validate({"base": run_tree(prepared), "arms": arms, "comparisons": {"reference": "a"}})


def _attention(kind: str) -> dict[str, Any]:
    return {"model": {"attention": {"type": kind}}}


@pytest.fixture
def behave(study: Study, tmp_path: Path) -> Callable[..., Path]:
    """The directory of a study in which the named arms do as said, the others finish."""

    def make(**arms: str) -> Path:
        (tmp_path / "behaviour.json").write_text(json.dumps(arms))
        configs = {name: configuration.dump(study.config(name)) for name in study.arms}
        (tmp_path / "configs.json").write_text(json.dumps(configs))
        return tmp_path

    return make


def _started(out: Path) -> list[dict[str, Any]]:
    path = out / "started.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _states(jobs: Sequence[queue.Job]) -> dict[str, str]:
    return {job.name: job.state for job in jobs}


def test_arms_run_in_order_and_finished_ones_are_skipped(study: Study, behave: Callable[..., Path]) -> None:
    out = behave()
    assert set(_states(queue.run(study, out, ["a", "b"], 1)).values()) == {"done"}
    assert [one["arm"] for one in _started(out)] == ["a", "b"]
    assert set(_states(queue.run(study, out, list(study.arms), 1)).values()) == {"done"}
    assert [one["arm"] for one in _started(out)] == ["a", "b", "c", "noisy"]


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("summary.json", None),  # evaluated before its training ended
        ("evaluation-test.json", {"step": 2}),  # a checkpoint that a better one followed
        ("evaluation-test.json", None),
    ],
)
def test_arm_whose_results_are_not_of_its_end_is_worked_on_again(
    file: str, content: dict[str, int] | None, study: Study, behave: Callable[..., Path]
) -> None:
    out = behave()
    queue.run(study, out, ["c"], 1)
    (out / "c" / file).unlink()
    if content:
        (out / "c" / file).write_text(json.dumps(content))
    assert _states(queue.run(study, out, ["c"], 1)) == {"c": "done"}
    assert [one["arm"] for one in _started(out)] == ["c", "c"]


def test_results_outlive_cleared_checkpoints(study: Study, behave: Callable[..., Path]) -> None:
    out = behave()
    queue.run(study, out, ["c"], 1)
    shutil.rmtree(out / "c" / "checkpoints")
    assert finished(out, "c")


def test_other_inference_asked_for_later_is_run(study: Study, behave: Callable[..., Path]) -> None:
    out = behave()
    queue.run(study, out, ["b"], 1)
    for asked in ({"inference": "sample"}, {"inference": "mc"}):
        study.arms["b"] = study.arms["b"].model_copy(update={"also_infer": {"other": asked}})
        for _ in range(2):  # the second time nothing is left
            assert _states(queue.run(study, out, ["b"], 1)) == {"b": "done"}
    assert len(_started(out)) == 3


def test_failed_arm_is_told_and_the_others_go_on(study: Study, behave: Callable[..., Path]) -> None:
    out = behave(a="fail")
    jobs = {job.name: job for job in queue.run(study, out, list(study.arms), 1)}
    assert _states(list(jobs.values())) == {"a": "failed", "b": "done", "c": "done", "noisy": "failed"}
    assert jobs["a"].error == "no room for it"
    assert jobs["noisy"].error == "needs a, which failed"
    assert "noisy" not in [one["arm"] for one in _started(out)]
    behave()
    assert set(_states(queue.run(study, out, list(study.arms), 1)).values()) == {"done"}
    assert [one["arm"] for one in _started(out)] == ["a", "b", "c", "a", "noisy"]


def test_reason_of_an_earlier_start_is_not_told_again(study: Study, behave: Callable[..., Path]) -> None:
    (job,) = queue.run(study, behave(c="fail"), ["c"], 1)
    assert job.error == "no room for it"
    (job,) = queue.run(study, behave(c="quit"), ["c"], 1)
    assert job.error == "ended with exit code 3"


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        ("epoch 1\nsome warning", None),
        ("error: loss is nan\nerror: training in x ended with exit code 2; its messages are above", "loss is nan"),
        ("error: training in x ended with exit code -9; its messages are above", "training in x ended with exit .*"),
        (
            f"[rank0]: {queue._TRACEBACK}\n[rank0]:   File x, line 1\n[rank0]: ValueError: no\nterminated\n"
            "error: training in x ended with exit code 1; its messages are above",
            "ValueError: no",
        ),
        (f"error: a warning that was survived\n{queue._TRACEBACK}\n  File x\nKeyError: 'y'\n", "KeyError: 'y'"),
    ],
)
def test_reason_is_read_from_the_log(lines: str, reason: str | None, tmp_path: Path) -> None:
    log, before = tmp_path / "log", "error: of another start\n"
    log.write_text(before + lines)
    found = queue._reason(log, len(before))
    assert found is None if reason is None else re.fullmatch(reason, str(found))


def test_killed_arm_leaves_no_worker(study: Study, behave: Callable[..., Path]) -> None:
    out = behave(a="orphan")

    def kill(jobs: Sequence[queue.Job]) -> None:
        process = jobs[0].process
        if jobs[0].family and (out / "a.child").exists() and process and process.poll() is None:
            process.kill()

    (job,) = queue.run(study, out, ["a"], 1, kill)
    assert (job.state, job.error) == ("failed", "ended by signal 9")
    assert not _lives(int((out / "a.child").read_text()))


def _lives(pid: int) -> bool:
    """Whoever has to collect it may not have done so yet."""
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_two_at_a_time_share_the_cores(study: Study, behave: Callable[..., Path]) -> None:
    out = behave(a="meet", b="meet")
    seen = 0

    def watch(jobs: Sequence[queue.Job]) -> None:
        nonlocal seen
        seen = max(seen, sum(job.state == "running" for job in jobs))

    assert set(_states(queue.run(study, out, ["a", "b", "c"], 2, watch)).values()) == {"done"}
    assert seen == 2
    assert {one["threads"] for one in _started(out)} == {str(max(1, int(available_cores()) // 2))}


def test_needs_that_are_neither_named_nor_finished_are_refused(study: Study, behave: Callable[..., Path]) -> None:
    out = behave()
    with pytest.raises(GenattError, match=r"arm noisy needs arm b, which is not finished in .*: add it to --arms"):
        queue.run(study, out, ["a", "noisy"], 1)
    queue.run(study, out, ["a", "b"], 1)
    assert _states(queue.run(study, out, ["noisy"], 1)) == {"noisy": "done"}


def test_unknown_arm_is_refused(study: Study, behave: Callable[..., Path]) -> None:
    with pytest.raises(GenattError, match="--arms names 'd', which is no arm: use a, b, c, noisy"):
        queue.run(study, behave(), ["d"], 1)


def test_what_the_study_did_not_make_is_refused_and_kept(study: Study, behave: Callable[..., Path]) -> None:
    out = behave()
    (out / "a").mkdir()
    (out / "a" / "thesis.txt").write_text("mine")
    with pytest.raises(GenattError, match=r"/a is no run of this study \(no config.yaml in it\): move it away"):
        queue.run(study, out, ["c"], 1)
    with pytest.raises(GenattError, match="is no run of this study"):
        arm.complete(study.config("a"), out / "a")
    assert (out / "a" / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize("place", ["file", "file/study", "/proc/study"])
def test_place_that_cannot_be_written_is_one_line(place: str, study: Study, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(GenattError, match=r"cannot write study directory .*; choose another --out$"):
        queue.run(study, tmp_path / place, ["a"], 1)


@pytest.mark.parametrize("place", ["file/copy.json", "/proc/copy.json", "directory"])
def test_copy_that_cannot_be_written_is_told_at_the_start(
    place: str, study: Study, behave: Callable[..., Path]
) -> None:
    out = behave()
    (out / "file").touch()
    (out / "directory").mkdir()
    (out / "study.yaml").write_text(plan.dump(study))
    with pytest.raises(GenattError, match=r"cannot write .*; choose another --out-file$"):
        quality(out / "study.yaml", out, ["a"], [], 1, out / place, Console(stderr=True))
    assert _started(out) == []


@pytest.mark.parametrize("selected", [["a"], ["b"]])
def test_changing_an_arm_that_was_begun_is_refused(
    selected: list[str], study: Study, behave: Callable[..., Path]
) -> None:
    """Also where another arm is asked for: they are compared in the end."""
    out = behave()
    (out / "a").mkdir()
    (out / "a" / "config.yaml").write_text(configuration.dump(study.config("a")))
    changed = study.model_copy(update={"base": plan.merged(study.base, {"training": {"epochs": 3}})})
    with pytest.raises(GenattError, match=r"arm a of .* another configuration: training.epochs was 2, is 3; keep it,"):
        queue.run(changed, out, selected, 1)
    assert _started(out) == []
    assert set(_states(queue.run(study, out, selected, 1)).values()) == {"done"}


def test_changing_how_noise_is_matched_is_refused(study: Study, behave: Callable[..., Path]) -> None:
    out = behave()
    (out / "rounds").mkdir()
    settings = {"weights": "a", "target": "b", "tolerance": 0.2, "rounds": 3, "users": 2048}
    (out / "rounds" / "noisy.json").write_text(json.dumps({"settings": settings, "rounds": []}))
    with pytest.raises(GenattError, match=r"arm noisy of .*: tolerance was 0.2, is 0.1"):
        queue.run(study, out, ["c"], 1)


def test_arm_that_takes_too_long_is_ended(
    study: Study, behave: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queue, "_BESIDE_TRAINING_SECONDS", 0)
    for name, seconds in (("a", 0.5), ("c", 60)):
        study.arms[name] = study.arms[name].model_copy(update={"overrides": {"training": {"max_seconds": seconds}}})
    out = behave(a="hang")
    jobs = {job.name: job for job in queue.run(study, out, ["a", "c"], 1)}
    assert _states(list(jobs.values())) == {"a": "failed", "c": "done"}
    assert "was ended after 1 s" in str(jobs["a"].error)
    assert not psutil.pid_exists(_started(out)[0]["pid"])


def test_interrupted_queue_leaves_no_process_and_can_be_started_again(
    study: Study, behave: Callable[..., Path]
) -> None:
    out = behave(a="hang", b="hang")

    def interrupt(jobs: Sequence[queue.Job]) -> None:
        if len(_started(out)) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        queue.run(study, out, ["a", "b"], 2, interrupt)
    assert not any(psutil.pid_exists(one["pid"]) for one in _started(out))
    behave()
    assert set(_states(queue.run(study, out, ["a", "b"], 2)).values()) == {"done"}


def test_lost_terminal_tells_every_arm_before_it_waits_for_one(study: Study, behave: Callable[..., Path]) -> None:
    """Both are told to end before either has ended; the SIGTERM that each sends back meanwhile changes nothing."""
    out = behave(a="await", b="await")
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # ignored where the tests themselves run under nohup
    handlers = [signal.getsignal(one) for one in queue._STOPPING]

    def hang_up(jobs: Sequence[queue.Job]) -> None:
        if len(_started(out)) == 2:
            os.kill(os.getpid(), signal.SIGHUP)

    try:
        with pytest.raises(SystemExit) as end:
            queue.run(study, out, ["a", "b"], 2, hang_up)
        assert [signal.getsignal(one) for one in queue._STOPPING] == handlers
    finally:
        signal.signal(signal.SIGHUP, before)
    assert end.value.code == 128 + signal.SIGHUP
    assert all((out / f"{name}.well").exists() for name in ("a", "b"))
    assert not any(_lives(one["pid"]) for one in _started(out))


def test_second_queue_in_one_directory_is_refused(study: Study, behave: Callable[..., Path]) -> None:
    out = behave()
    with (out / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        print(f"{os.getpid()} queue", file=file, flush=True)
        with pytest.raises(GenattError, match=rf"is in use by another .*started there: {os.getpid()} queue"):
            queue.run(study, out, ["a"], 1)
    assert _states(queue.run(study, out, ["a"], 1)) == {"a": "done"}


class TestPlan:
    @pytest.fixture
    def load(self, prepared: Path, tmp_path: Path) -> Callable[..., Study]:
        def read(*overrides: str, **changes: Any) -> Study:
            tree = {
                "base": run_tree(prepared),
                "arms": {"a": {}, "v": {"overrides": _attention("variational")}},
                "comparisons": {"reference": "a", "claims": ["v"]},
            }
            (tmp_path / "study.yaml").write_text(yaml.safe_dump(tree | changes, sort_keys=False))
            return plan.load(tmp_path / "study.yaml", overrides)

        return read

    def test_overrides_change_every_arm_and_an_arm_goes_first(self, load: Callable[..., Study]) -> None:
        arms = {"a": {}, "long": {"overrides": {"training": {"epochs": 9}}}}
        study = load("training.epochs=5", "data.max_len=6", arms=arms, comparisons={"reference": "a"})
        assert [study.config(name).training.epochs for name in study.arms] == [5, 9]
        assert {study.config(name).data.max_len for name in study.arms} == {6}

    def test_dump_loads_as_an_equal_study(self, load: Callable[..., Study], tmp_path: Path) -> None:
        study = load("training.epochs=5")
        (tmp_path / "again.yaml").write_text(plan.dump(study))
        assert plan.load(tmp_path / "again.yaml") == study

    def test_another_type_drops_what_the_base_said_of_the_first(self) -> None:
        base = {"attention": {"type": "variational", "gamma": 2.0}, "d": 1}
        assert plan.merged(base, {"attention": {"type": "gru"}}) == {"attention": {"type": "gru"}, "d": 1}
        assert plan.merged(base, {"attention": {"gamma": 3.0}})["attention"] == {"type": "variational", "gamma": 3.0}
        assert base["attention"] == {"type": "variational", "gamma": 2.0}

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"arm": {}}, "unknown key arm"),
            ({"arms": {"a": {"override": {}}}}, "unknown key arms.a.override"),
            (
                {"arms": {"a": {"overrides": {"model": {"hidden": 8}}}, "v": {}}},
                "config of arm a: unknown key model.hidden",
            ),
            ({"arms": {"a/b": {}}}, "arm 'a/b' is no directory name"),
            ({"arms": {"a": {}}}, "comparisons.claims names 'v', which is no arm: use a"),
            ({"comparisons": {"reference": "b"}}, "comparisons.reference names 'b', which is no arm: use a, v"),
            ({"comparisons": {"reference": "a", "metrics": ["auc"]}}, "metric 'auc' cannot be compared user by user"),
            ({"comparisons": {"reference": "a", "metrics": []}}, "comparisons.metrics: .* at least 1 item"),
            ({"comparisons": {"reference": "a", "controls": ["w"]}}, "comparisons.controls names 'w', which is no arm"),
            ({"comparisons": {"reference": "a", "claims": ["v"], "controls": ["v"]}}, "comparisons names 'v' twice"),
            ({"comparisons": {"reference": "a", "claims": ["a"]}}, "comparisons names 'a' twice"),
            ({"arms": {"a": {}, "v": {}, "rounds": {}}}, "arm 'rounds' has the name of a directory that the study"),
            ({"arms": {"a": {}, "v": {}, "logs": {}}}, "arm 'logs' has the name of a directory that the study"),
            (
                {
                    "arms": {
                        "a": {"match_noise": {"weights": "v", "target": "v"}},
                        "v": {"match_noise": {"weights": "a", "target": "a"}},
                    }
                },
                "arms need each other in a circle",
            ),
        ],
    )
    def test_mistake_is_named(self, changes: dict[str, Any], message: str, load: Callable[..., Study]) -> None:
        with pytest.raises(GenattError, match=message):
            load(**changes)

    def test_the_committed_study_is_possible(self) -> None:
        study = plan.load(Path(__file__).parents[2] / "configs" / "study_quality.yaml")
        kinds = {study.config(name).model.attention.type for name in study.arms}
        assert kinds == set(study.arms)  # every type there is, each under its own name
        assert {study.config(name).training for name in study.arms} == {study.config("dot_product").training}
