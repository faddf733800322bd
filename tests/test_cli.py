"""`genatt`: what it offers is frozen, help is fast, and a mistake is one line that names the thing and the mend."""

import json
import resource
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import typer.main
import yaml
from tiny_data import histories, run_tree

from data_pipeline import inspection
from data_pipeline.config import PrepareConfig
from data_pipeline.errors import GenattError
from data_pipeline.format import Manifest, load_manifest
from data_pipeline.splits import RandomUsers
from genatt_dist import cli, doctor
from genatt_dist.doctor import Check
from genatt_dist.prepare_options import FIELDS

SURFACE = {
    "prepare": [
        "source", "--out", "--format", "--separator",
        "--user-column", "--item-column", "--time-column", "--id-type", "--time-unit", "--event-column",
        "--event-weights", "--time-from", "--time-to", "--duplicates", "--min-user", "--min-item",
        "--items", "--min-count", "--out-of-vocabulary", "--hash-buckets", "--max-history", "--split",
        "--name", "--num-shards", "--row-group-size", "--seed", "--append-to",
        "--num-cpus", "--rows-per-block", "--object-store-bytes", "--config", "--dry-run", "--quiet", "--json",
    ],
    "inspect": ["path", "--top", "--verify", "--json"],
    "train": [
        "config", "--run", "overrides", "--launcher", "--resume", "--hostfile", "--ssh", "--ssh-port", "--nnodes",
        "--rendezvous", "--node-rank", "--master-port", "--start-seconds",
    ],
    "evaluate": ["run", "inference", "--split", "--category", "--json"],
    "recommend": ["run", "--users", "--out", "--k", "--category", "--category-column", "inference"],
    "checkpoints": ["run", "--verify", "--export", "--step", "--json"],
    "plan": [
        "config", "overrides", "--nodes", "--gpus-per-node", "--gpu", "--memory", "--items", "--length",
        "--json", "--out",
    ],
    "quickstart": ["--data", "--out", "--launcher", "overrides"],
    "doctor": ["--json"],
    "compare": ["runs", "--split", "--metric", "--json"],
    "report": ["runs", "--out", "--steps"],
    "bench steps": [
        "--out", "--quick", "--select", "--steps", "--sampling-steps", "--max-len", "--training-batch",
        "--serving-batch", "--items", "--rounds", "--variant-seconds", "--memory-limit",
    ],
    "submit": [
        "job", "config", "overrides", "--run", "--out", "--address", "--env", "--exclude", "--entrypoint-num-cpus",
        "--timeout", "--detach",
    ],
    "jobs list": ["--address", "--json"],
    "jobs logs": ["job_id", "--follow", "--address"],
    "jobs stop": ["job_id", "--wait", "--timeout", "--address"],
    "bench scaling": [
        "--out", "--config", "--ranks", "--steps", "--items", "--full-items", "--few-steps", "--tables", "--mode",
        "--select", "--batch", "--launcher", "--start-seconds", "--rounds", "--turn-seconds", "--row-seconds",
        "--memory-mb", "--quick", "--trace", "--again", "--model",
    ],
    "study quality": ["--out", "--config", "--jobs", "--arms", "--out-file", "overrides"],
}  # fmt: skip


def _commands(group: Any, before: str = "") -> dict[str, Any]:
    """Every command by the words that name it, those of groups too."""
    found: dict[str, Any] = {}
    for name, command in group.commands.items():
        words = f"{before}{name}"
        found |= _commands(command, f"{words} ") if hasattr(command, "commands") else {words: command}
    return found


COMMANDS: dict[str, Any] = _commands(typer.main.get_command(cli.app))
every_verb = pytest.mark.parametrize("verb", SURFACE)

Genatt = Callable[..., tuple[int, str, str]]


@pytest.fixture
def genatt(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Genatt:
    """Runs the entry point in this process; an exception that leaves it is a traceback, and fails the test."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["genatt", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as caught:
            cli.main()
        out, err = capfd.readouterr()
        return int(caught.value.code or 0), out, err

    return run


@pytest.fixture
def refusal(genatt: Genatt, tmp_path: Path) -> Callable[..., str]:
    """The one line of an error; nothing may be written anywhere in the test's directory."""

    def run(*arguments: object) -> str:
        before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
        code, out, err = genatt(*arguments)
        assert code == 2
        assert out == ""
        assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
        lines = err.splitlines()
        assert len(lines) == 1, err
        assert lines[0].startswith("error: ")
        return lines[0]

    return run


@pytest.fixture
def config(prepared: Path, tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(run_tree(prepared)))
    return path


def test_verbs_and_options_are_frozen() -> None:
    """Scripts and documents hang on them. A change here is a change for users: add, and do not rename."""
    found = {
        verb: [
            (parameter.opts[0] if parameter.opts[0].startswith("-") else parameter.name) for parameter in command.params
        ]
        for verb, command in COMMANDS.items()
    }
    assert found == SURFACE


@every_verb
def test_help_ends_with_two_examples(verb: str, genatt: Genatt) -> None:
    code, out, err = genatt(*verb.split(), "--help")
    assert (code, err) == (0, "")
    before, examples = out.split("Examples:")
    assert examples.count(f"$ genatt {verb}") == examples.count("$ ") == 2
    assert "Usage: genatt" in before


@every_verb
def test_examples_are_commands_that_parse(verb: str) -> None:
    lines = [line.partition("$ ")[2] for line in COMMANDS[verb].epilog.splitlines() if "$ " in line]
    for line in lines:
        words = shlex.split(line.partition("   (")[0])
        named = len(verb.split())
        assert words[: 1 + named] == ["genatt", *verb.split()]
        COMMANDS[verb].make_context(verb, words[1 + named :])


@every_verb
def test_every_option_says_what_it_is_for(verb: str) -> None:
    assert COMMANDS[verb].help
    for parameter in COMMANDS[verb].params:
        assert parameter.help, parameter.name


def test_the_entry_point_is_installed() -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"genatt": "genatt_dist.cli:main"}


def test_help_is_fast_and_loads_no_heavy_library() -> None:
    code = (
        "import sys\n"
        "sys.argv = ['genatt', '--help']\n"
        "from genatt_dist.cli import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code\n"
        "heavy = {'torch', 'ray', 'deepspeed', 'torchrec', 'polars', 'pyarrow', 'numpy', 'pydantic'}\n"
        "print(f'heavy: {sorted(heavy & sys.modules.keys())}', file=sys.stderr)"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.stderr == "heavy: []\n"
    assert "quickstart" in done.stdout
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.5


def test_without_arguments_the_help_is_shown(genatt: Genatt) -> None:
    code, out, err = genatt()
    assert code == 2
    assert "quickstart" in out + err
    assert "error:" not in out + err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "No such command 'trian'"),
        (["train"], "Missing argument 'config': see genatt train --help"),
        (["train", "x.yaml"], "Missing option '--run': see genatt train --help"),
        (["evaluate", "runs/x", "--splt", "test"], "No such option: --splt (Possible options: --split)"),
        (["recommend", "r", "--users", "u", "--out", "o", "--k", "ten"], "Invalid value for '--k'"),
    ],
)
def test_a_wrong_word_on_the_command_line(arguments: list[str], message: str, refusal: Callable[..., str]) -> None:
    assert message in refusal(*arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--min-user", "0"], "--min-user 0: input should be greater than or equal to 1"),
        (["--num-shards", "0"], "--num-shards 0: input should be greater than or equal to 1"),
        (["--format", "xml"], "--format 'xml': input should be 'auto', 'parquet', 'csv' or 'jsonl'"),
        (["--duplicates", "all"], "--duplicates 'all': input should be 'none', 'exact' or 'consecutive'"),
        (["--separator", "ab"], "--separator 'ab'"),
        (["--id-type", "int"], "--id-type 'int': input should be 'auto' or 'string'"),
        (["--duplicates", "exact", "--time-column", ""], "--duplicates exact compares times: name a --time-column"),
        (["--user-column", "item_id"], "--user-column, --item-column, --time-column and --event-column must differ"),
        (["--event-column", "kind"], "--event-column and --event-weights go together: give both or neither"),
        (["--event-weights", "view"], "--event-weights 'view': give EVENT=WEIGHT,EVENT=WEIGHT,…, as in view=1,cart=3"),
        (["--event-column", "kind", "--event-weights", "view=much"], "--event-weights 'view=much': input should be"),
        (["--split", "users:0.5"], "--split 'users:0.5': give leave_one_out, time:VALID_FROM,TEST_FROM or users:"),
        (["--split", "users:0.9,0.2"], "valid_share=0.9 and test_share=0.2 leave no user to train"),
        (["--hash-buckets", "8", "--min-count", "2"], "--hash-buckets gives every item an id: leave --min-count and"),
        (["--time-from", "7", "--time-column", ""], "--time-from and --time-to need a --time-column"),
    ],
)
def test_a_bad_option_of_prepare(options: list[str], message: str, refusal: Callable[..., str], tmp_path: Path) -> None:
    assert message in refusal("prepare", "log.csv", "--out", tmp_path / "out", *options)


class TestOptionsOfPrepare:
    """What reaches `prepare` of what was typed."""

    @pytest.fixture
    def told(self, genatt: Genatt, prepared: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., PrepareConfig]:
        """Runs `genatt prepare` without preparing; returns the options it was given."""
        caught: list[PrepareConfig] = []

        def catch(config: PrepareConfig, progress: bool = True) -> Manifest:
            caught.append(config)
            return load_manifest(str(prepared))

        monkeypatch.setattr("data_pipeline.prepare.prepare", catch)

        def run(*arguments: object) -> PrepareConfig:
            code, _, err = genatt("prepare", *arguments)
            assert (code, err) == (0, "")
            return caught.pop()

        return run

    def test_the_defaults_are_those_of_the_config(self) -> None:
        fields = {key: FIELDS.get(key, key) for key in (option.name for option in COMMANDS["prepare"].params)}
        others = {"config", "dry_run", "quiet", "as_json"}
        assert set(fields.values()) - others == PrepareConfig.model_fields.keys()
        config = PrepareConfig(source="-", out="-")
        for option in COMMANDS["prepare"].params:
            if option.name not in {"source", "out", "split"} | others:
                assert option.default == getattr(config, fields[option.name]), option.name
        split = next(option.default for option in COMMANDS["prepare"].params if option.name == "split")
        assert PrepareConfig(source="-", out="-", split=split).split == config.split

    def test_only_what_is_typed_is_set(self, told: Callable[..., PrepareConfig]) -> None:
        """An appended version takes the rest from its parent."""
        found = told("new.parquet", "--out", "v2", "--append-to", "v1", "--min-user", "5")
        assert found.model_fields_set == {"source", "out", "append_to", "min_user_interactions"}

    def test_every_option(self, told: Callable[..., PrepareConfig]) -> None:
        line = (
            "log --out o --format jsonl --separator ; --user-column u --item-column i --time-column t --id-type string "
            "--time-unit ms --event-column e --event-weights view=1,a=b=2.5 --time-from 5 --time-to 2024-01-31 "
            "--duplicates exact --min-user 2 --min-item 3 --items attributes.csv --min-count 4 --out-of-vocabulary "
            "bucket --max-history 6 --split users:0.1,0.2 --name n --num-shards 7 --row-group-size 9 --seed 10 "
            "--append-to p --num-cpus 2 --rows-per-block 11 --object-store-bytes 134217728"
        )
        assert told(*line.split()) == PrepareConfig(
            source="log", out="o", format="jsonl", separator=";", user_column="u", item_column="i", time_column="t",
            id_type="string", time_unit="ms", event_column="e", event_weights={"view": 1, "a=b": 2.5}, time_from=5,
            time_to="2024-01-31", duplicates="exact", min_user_interactions=2, min_item_interactions=3,
            items="attributes.csv", min_count=4, out_of_vocabulary="bucket", max_history=6,
            split=RandomUsers(valid_share=0.1, test_share=0.2), name="n", num_shards=7, row_group_size=9, seed=10,
            append_to="p", num_cpus=2, rows_per_block=11, object_store_bytes=1 << 27,
        )  # fmt: skip

    def test_a_file_of_options_and_what_is_typed_wins(self, told: Callable[..., PrepareConfig], tmp_path: Path) -> None:
        path = tmp_path / "prepare.yaml"
        tree = {"source": "log", "out": "here", "min_user_interactions": 3, "seed": 4, "event_column": "e"}
        path.write_text(yaml.safe_dump(tree | {"event_weights": {"view": 1}}))
        found = told("--config", path, "--out", "there", "--min-user", 2)
        assert (found.source, found.out, found.min_user_interactions, found.seed) == ("log", "there", 2, 4)
        assert found.event_weights == {"view": 1.0}

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("sourec: log", "unknown key sourec: did you mean source?"),
            ("source: log\nout: o\nseed: -1", "prepare.yaml: seed -1: input should be greater than or equal to 0"),
            ("- source", "holds no keys"),
            ("source: [", "prepare.yaml: while parsing"),
            ("out: o", "no SOURCE is given: name it, or set source in"),
            (None, "No such file or directory: name an existing YAML file"),
        ],
    )
    def test_a_bad_file_of_options(
        self, text: str | None, message: str, refusal: Callable[..., str], tmp_path: Path
    ) -> None:
        if text is not None:
            (tmp_path / "prepare.yaml").write_text(text)
        assert message in refusal("prepare", "--config", tmp_path / "prepare.yaml")

    def test_what_is_missing_is_named(self, refusal: Callable[..., str]) -> None:
        assert "no SOURCE is given: name it, or give a --config file" in refusal("prepare", "--out", "o")
        assert "no --out is given" in refusal("prepare", "log.csv")

    def test_it_ends_with_counts_and_the_next_command(
        self, told: Callable[..., PrepareConfig], genatt: Genatt, prepared: Path
    ) -> None:
        manifest = load_manifest(str(prepared))
        counts = f"48 users, 40 items, {manifest.num_interactions} interactions in 2 files"
        _, out, _ = genatt("prepare", "log", "--out", "s3://key:secret@bucket/o")
        assert out == f"s3://bucket/o: {counts}. Next: genatt inspect s3://bucket/o\n"
        assert genatt("prepare", "log", "--out", "o", "--quiet") == (0, "", "")
        _, out, _ = genatt("prepare", "log", "--out", "o", "--json")
        assert json.loads(out) == {
            "out": "o", "name": "tiny", "users": 48, "items": 40, "interactions": manifest.num_interactions, "files": 2,
        }  # fmt: skip


class TestInspect:
    def test_tables(self, genatt: Genatt, prepared: Path) -> None:
        code, out, err = genatt("inspect", prepared, "--top", 3, "--verify")
        assert (code, err) == (0, "")
        assert out.startswith("tiny: 48 users, 40 items, ")
        assert "top 3 items" in out
        assert "interactions of a user: min 1, p50" in out

    def test_json(self, genatt: Genatt, prepared: Path) -> None:
        code, out, err = genatt("inspect", prepared, "--json")
        assert (code, err) == (0, "")
        assert json.loads(out) == json.loads(json.dumps(inspection.inspect(str(prepared)).as_data()))

    def test_nothing_prepared(self, refusal: Callable[..., str], tmp_path: Path) -> None:
        assert "is no prepared data set (no manifest.json there)" in refusal("inspect", tmp_path)

    def test_damage(self, refusal: Callable[..., str], prepared: Path, tmp_path: Path) -> None:
        shutil.copytree(prepared, tmp_path / "copy")
        (tmp_path / "copy" / "shards" / "part-00000.parquet").write_bytes(b"")
        assert "part-00000.parquet is damaged" in refusal("inspect", tmp_path / "copy", "--verify")


class TestPrepareRefusesBeforeRayStarts:
    @pytest.fixture(autouse=True)
    def no_cluster(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def start(*_: object, **__: object) -> None:
            raise AssertionError("a cluster was started")

        monkeypatch.setattr("ray.init", start)

    @pytest.fixture
    def log(self, tmp_path: Path) -> Path:
        pairs = [(user, item) for user, items in enumerate(histories()) for item in items]
        frame = pl.DataFrame(pairs, schema=["user_id", "item_id"], orient="row").with_row_index("timestamp")
        frame.write_parquet(tmp_path / "log.parquet")
        frame.write_csv(tmp_path / "log.csv")
        return tmp_path / "log.parquet"

    def test_a_dry_run_writes_nothing(self, log: Path, genatt: Genatt, tmp_path: Path) -> None:
        before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
        line = ("prepare", log, "--out", tmp_path / "out", "--user-column", "user_id", "--dry-run")
        code, out, err = genatt(*line)
        assert (code, err) == (0, "")
        assert "dry run, nothing is written" in out
        code, out, _ = genatt(*line, "--json")
        found = json.loads(out)
        assert (found["rows"], found["read_tasks"]) == ({"number": pl.read_parquet(log).height, "estimated": False}, 1)
        assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before

    def test_a_missing_file(self, refusal: Callable[..., str], tmp_path: Path) -> None:
        message = refusal("prepare", tmp_path / "gone.csv", "--out", tmp_path / "out")
        assert f"{tmp_path / 'gone.csv'} does not exist" in message

    def test_an_unknown_name(self, refusal: Callable[..., str], tmp_path: Path) -> None:
        assert "did you mean 'ml-100k'?" in refusal("prepare", "ml-10k", "--out", tmp_path / "out")

    @pytest.mark.parametrize("name", ["log.parquet", "log.csv"])
    def test_a_wrong_column(self, name: str, log: Path, refusal: Callable[..., str], tmp_path: Path) -> None:
        message = refusal("prepare", log.with_name(name), "--out", tmp_path / "out", "--user-column", "uid")
        assert "'uid'" in message
        assert "user_id" in message  # what there is
        assert "item_id" in message

    def test_an_empty_file(self, refusal: Callable[..., str], tmp_path: Path) -> None:
        (tmp_path / "empty.csv").write_text("")
        assert "empty.csv is empty (0 bytes)" in refusal("prepare", tmp_path / "empty.csv", "--out", tmp_path / "out")

    def test_a_truncated_parquet_file(self, log: Path, refusal: Callable[..., str], tmp_path: Path) -> None:
        cut = tmp_path / "cut.parquet"
        cut.write_bytes(log.read_bytes()[:-40])
        assert "cut.parquet" in refusal("prepare", cut, "--out", tmp_path / "out")

    def test_an_output_that_exists(self, log: Path, refusal: Callable[..., str], tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        assert "out exists already: choose another --out" in refusal("prepare", log, "--out", tmp_path / "out")

    def test_an_output_that_cannot_be_written(self, log: Path, refusal: Callable[..., str]) -> None:
        """Below a regular file: refused to root too."""
        assert "choose an --out you may write to" in refusal("prepare", log, "--out", log / "out")


class TestTrainRefusesBeforeAnyProcessStarts:
    @pytest.fixture(autouse=True)
    def no_process(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def start(*_: object, **__: object) -> None:
            raise AssertionError("a process was started")

        monkeypatch.setattr("genatt_dist.launch.group.subprocess.Popen", start)

    @pytest.fixture
    def train(self, refusal: Callable[..., str], config: Path, tmp_path: Path) -> Callable[..., str]:
        return lambda *more, run=tmp_path / "run": refusal("train", config, "--run", run, *more)

    def test_a_missing_config(self, refusal: Callable[..., str], tmp_path: Path) -> None:
        message = refusal("train", tmp_path / "gone.yaml", "--run", tmp_path / "run")
        assert "gone.yaml: No such file or directory; name an existing YAML file" in message

    def test_an_unknown_key(self, train: Callable[..., str]) -> None:
        assert "unknown key training.epoch: did you mean training.epochs?" in train("training.epoch=3")

    def test_an_unknown_key_among_options(self, train: Callable[..., str]) -> None:
        assert "override 'oops' is not of the form" in train("--launcher", "process", "oops")

    def test_more_ranks_than_sequences_in_a_batch(self, train: Callable[..., str]) -> None:
        message = train("world_size=9", "training.batch_sequences=2")
        assert "world_size=9 ranks but a global batch holds as few as" in message
        assert "raise training.batch_sequences or lower world_size" in message

    def test_more_ranks_than_users_to_validate_on(self, train: Callable[..., str], tmp_path: Path) -> None:
        from tiny_data import write_prepared

        path = tmp_path / "short"
        write_prepared(path, [[1, 2]] * 20)
        message = train(f"data.path={path}")
        assert "0 users have an item to validate on (split leave_one_out), fewer than world_size=1" in message

    def test_a_run_directory_that_exists(self, train: Callable[..., str], tmp_path: Path) -> None:
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "mine.txt").write_text("keep")
        assert "run exists: choose another --run, or go on with it by --resume" in train()

    def test_a_run_directory_that_is_a_url(self, train: Callable[..., str]) -> None:
        assert "--run s3://… is a URL: `genatt submit train` takes one" in train(run=Path("s3://bucket/run"))

    def test_a_run_directory_that_cannot_be_written(self, train: Callable[..., str], config: Path) -> None:
        message = train(run=config / "run")
        assert "cannot write run directory" in message
        assert "choose another --run" in message

    @pytest.mark.parametrize("file", ["shards/part-00001.parquet", "vocabulary/items.parquet"])
    def test_a_corrupted_shard(self, file: str, train: Callable[..., str], prepared: Path, tmp_path: Path) -> None:
        damaged = tmp_path / "damaged"
        shutil.copytree(prepared, damaged)
        content = bytearray((damaged / file).read_bytes())
        content[len(content) // 2] ^= 0xFF
        (damaged / file).write_bytes(content)
        message = train(f"data.path={damaged}")
        assert f"{file} is damaged: expected sha256" in message

    def test_data_that_is_none(self, train: Callable[..., str], tmp_path: Path) -> None:
        message = train(f"data.path={tmp_path / 'nothing'}")
        assert "is no prepared data set (no manifest.json there): run `genatt prepare` first" in message

    def test_an_unknown_launcher(self, train: Callable[..., str]) -> None:
        assert "launcher=mpi is unknown: use process, torchrun, deepspeed" in train("--launcher", "mpi")

    def test_one_process_for_two_ranks(self, train: Callable[..., str]) -> None:
        message = train("world_size=2", "--launcher", "process")
        assert "launcher=process runs one rank, but world_size=2: use torchrun or deepspeed" in message

    def test_nothing_to_resume(self, train: Callable[..., str]) -> None:
        assert "holds no complete checkpoint" in train("--resume")

    def test_a_resume_with_another_configuration(
        self, refusal: Callable[..., str], trained_run: Path, config: Path
    ) -> None:
        message = refusal("train", config, "--run", trained_run, "--resume", "model.hidden_size=8", "loss.kind=bce")
        assert "loss.kind was 'full', is 'bce', model.hidden_size was 16, is 8; only" in message
        assert "training.patience" in message


def test_a_run_that_could_not_be_started_leaves_nothing(
    genatt: Genatt, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("genatt_dist.launch.launchers._WORKER", "genatt_dist.no_such_module")
    code, _, err = genatt("train", config, "--run", tmp_path / "run")
    assert code == 2
    assert "ended with exit code 1 under launcher=process" in err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("verb", ["evaluate", "recommend"])
def test_a_directory_that_is_no_run(verb: str, refusal: Callable[..., str], tmp_path: Path) -> None:
    more = [] if verb == "evaluate" else ["--users", tmp_path / "u.csv", "--out", tmp_path / "o.parquet"]
    for run in (tmp_path, tmp_path / "gone"):
        assert f"{run} is not a run directory (no config.yaml in it)" in refusal(verb, run, *more)


def test_an_unknown_split(refusal: Callable[..., str], trained_run: Path) -> None:
    assert "--split train is unknown: use valid or test" in refusal("evaluate", trained_run, "--split", "train")


def test_evaluate_prints_json_alone_on_stdout(genatt: Genatt, trained_run: Path) -> None:
    code, out, err = genatt("evaluate", trained_run, "--split", "valid", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out) == json.loads((trained_run / "evaluation-valid.json").read_text())


def test_evaluate_prints_a_table_of_the_same_numbers(genatt: Genatt, trained_run: Path) -> None:
    code, out, _ = genatt("evaluate", trained_run)
    metrics = json.loads((trained_run / "evaluation-test.json").read_text())["metrics"]
    assert code == 0
    assert f"{metrics['ndcg@10']:.4f}" in out
    assert "dot_product on test" in out


def test_recommend_writes_a_table_and_names_what_it_skipped(genatt: Genatt, trained_run: Path, tmp_path: Path) -> None:
    users, out_file = tmp_path / "users.csv", tmp_path / "top.parquet"
    users.write_text("user_id\n105\n110\n999\n")
    code, out, err = genatt("recommend", trained_run, "--users", users, "--out", out_file, "--k", 4)
    assert code == 0
    assert "8 rows for 2 users" in out
    assert err == "note: skipped 1 users that are not in tiny; add their histories (an item column) to the file: 999\n"
    table = pl.read_parquet(out_file)
    assert table.schema == {"user_id": pl.Int64, "rank": pl.Int32, "item_id": pl.Int64, "score": pl.Float32}
    assert table["user_id"].to_list() == [105] * 4 + [110] * 4
    for user, part in table.group_by("user_id"):
        assert not set(part["item_id"]) & set(histories()[user[0] - 100])


@pytest.mark.parametrize(
    ("text", "k", "out", "message"),
    [
        (None, 3, "top.parquet", "users.csv does not exist"),
        ("user_id\n999\n", 3, "top.parquet", "none of its 1 users is in tiny"),
        ("uid\n105\n", 3, "top.parquet", "has no column user_id"),
        ("user_id\n105\n", 0, "top.parquet", "k=0 is not between 1 and the catalogue's 40 items"),
        ("user_id\n105\n", 41, "top.parquet", "k=41 is not between"),
        ("user_id\n105\n", 3, "users.csv/top.parquet", "cannot write"),
    ],
)
def test_recommend_refuses_in_one_line(
    text: str | None, k: int, out: str, message: str, refusal: Callable[..., str], trained_run: Path, tmp_path: Path
) -> None:
    users = tmp_path / "users.csv"
    if text is not None:
        users.write_text(text)
    assert message in refusal("recommend", trained_run, "--users", users, "--out", tmp_path / out, "--k", k)


class TestQuickstart:
    def test_refuses_missing_data_and_keeps_what_an_earlier_one_made(
        self, genatt: Genatt, prepared: Path, tmp_path: Path
    ) -> None:
        out = tmp_path / "quick"
        shutil.copytree(prepared, out / "shards")
        (out / "report.json").write_text("{}")
        code, _, err = genatt("quickstart", "--data", tmp_path / "gone.csv", "--out", out)
        assert code == 2
        assert err.splitlines()[-1].startswith(f"error: source {tmp_path / 'gone.csv'} does not exist")
        assert "Traceback" not in err
        assert (out / "report.json").exists()
        assert (out / "shards" / "manifest.json").exists()
        assert [path.name for path in tmp_path.iterdir()] == ["quick"]

    def test_replaces_an_earlier_one_once_the_new_data_are_prepared(
        self, genatt: Genatt, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def stop(*_: object) -> None:
            raise GenattError("far enough")

        monkeypatch.setattr("genatt_dist.quickstart.prepare", lambda config: shutil.copytree(prepared, config.out))
        monkeypatch.setattr("genatt_dist.quickstart.runs.train", stop)
        out = tmp_path / "quick"
        (out / "shards").mkdir(parents=True)
        (out / "shards" / "manifest.json").write_text("an older one")
        (out / "variational").mkdir()
        code, _, err = genatt("quickstart", "--out", out)
        assert (code, err.splitlines()[-1]) == (2, "error: far enough")
        assert [path.name for path in tmp_path.iterdir()] == ["quick"]
        assert [path.name for path in out.iterdir()] == ["shards"]
        assert (out / "shards" / "manifest.json").read_bytes() == (prepared / "manifest.json").read_bytes()

    @pytest.mark.parametrize("names", [["thesis.tex"], ["shards", "thesis.tex"], ["shards"], ["report.json"]])
    def test_refuses_a_directory_that_it_did_not_make(
        self, names: list[str], refusal: Callable[..., str], tmp_path: Path
    ) -> None:
        """It would be deleted: `--out .` beside prepared data must not cost anything."""
        out = tmp_path / "mine"
        for name in names:
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            (out / name).mkdir() if name == "shards" else (out / name).write_text("years of work")
        message = refusal("quickstart", "--out", out)
        assert f"{out} exists and no quickstart made all of it: choose another --out" in message

    def test_refuses_a_file_in_the_way(self, refusal: Callable[..., str], config: Path) -> None:
        assert "choose another --out" in refusal("quickstart", "--out", config)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["training.epoch=1"], "unknown key training.epoch: did you mean training.epochs?"),
            (["--launcher", "mpi"], "launcher=mpi is unknown"),
            (["--launcher", "process"], "launcher=process runs one rank, but world_size=2"),
        ],
    )
    def test_refuses_a_wrong_option_before_it_prepares(
        self, options: list[str], message: str, refusal: Callable[..., str], tmp_path: Path
    ) -> None:
        assert message in refusal("quickstart", "--out", tmp_path / "quick", *options)


CHECKS = [
    Check("Python", True, "3.11", ""),
    Check("GPU", None, "none", "fine without"),
]  # fmt: skip


@pytest.mark.parametrize(("checks", "code"), [(CHECKS, 0), ([*CHECKS, Check("torch", False, "2.0", "make setup")], 1)])
def test_doctor_prints_its_checks_as_json(
    checks: list[Check], code: int, genatt: Genatt, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "examine", lambda: checks)
    found, out, err = genatt("doctor", "--json")
    assert (found, err) == (code, "")
    assert json.loads(out) == [asdict(check) for check in checks]
    found, out, _ = genatt("doctor")
    assert found == code
    assert all(check.name in out for check in checks)


def test_ctrl_c_ends_with_130_and_no_traceback(genatt: Genatt, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted() -> list[Check]:
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "examine", interrupted)
    code, out, err = genatt("doctor")
    assert (code, out, err) == (130, "", "stopped\n")


@pytest.mark.ray
@pytest.mark.slow
def test_from_a_raw_log_to_recommendations(tmp_path: Path) -> None:
    """The four verbs one after the other, as a user types them."""
    pairs = [(f"user {user}", f"{item:05d}") for user, items in enumerate(histories()) for item in items]
    frame = pl.DataFrame(pairs, schema=["uid", "sku"], orient="row").with_row_index("timestamp")
    frame.write_csv(tmp_path / "log.csv")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run_tree("shards")))
    program = str(Path(sys.executable).with_name("genatt"))

    def run(line: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [program, *shlex.split(line)], cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False
        )
        assert "Traceback" not in done.stderr
        return done

    nulls = frame.with_columns(pl.when(pl.col("timestamp") == 7).then(None).otherwise(pl.col("uid")).alias("uid"))
    nulls.write_parquet(tmp_path / "nulls.parquet")
    columns = "--user-column uid --item-column sku --min-user 1 --min-item 1 --num-shards 2"
    failed = run(f"prepare nulls.parquet --out shards {columns}")
    assert failed.returncode == 2
    assert "error: " in failed.stderr.splitlines()[-1]
    assert "nulls.parquet" in failed.stderr.splitlines()[-1]
    assert not (tmp_path / "shards").exists()

    lines = [
        f"prepare log.csv --out shards {columns}",
        "train run.yaml --run run training.epochs=1",
        "evaluate run --json",
        "recommend run --users log.csv --out top.parquet --k 3",
    ]
    done = [run(line) for line in lines]
    assert [one.returncode for one in done] == [0] * 4, done[-1].stderr
    assert json.loads(done[2].stdout)["users"] == sum(len(items) >= 3 for items in histories())
    assert pl.read_parquet(tmp_path / "top.parquet")["user_id"].n_unique() == 47  # one has seen everything
