"""A configuration is refused before anything starts, with the key, its value and the mend."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_data import run_tree

from data_pipeline.errors import GenattError
from genatt_dist import config as configuration
from genatt_dist.config import RunConfig

CONFIGS = Path(__file__).parents[1] / "configs"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(run_tree("shards")))
    return path


TYPES = "dot_product, noisy_dot_product, positional, gru, deterministic, variational, diffusion, hybrid"


def refusal(file: Path, *overrides: str) -> str:
    with pytest.raises(GenattError) as caught:
        configuration.load(file, overrides)
    message = str(caught.value)
    assert "\n" not in message
    assert str(file) in message or "override" in message
    return message


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("modle.hidden_size=3", "unknown key modle: did you mean model?"),
        ("training.epoch=3", "unknown key training.epoch: did you mean training.epochs?"),
        ("loss.negatives=3", "unknown key loss.negatives: did you mean loss.num_negatives?"),
        ("zzz=3", "unknown key zzz: known: data, evaluation, features, loss, model, ray, table, training, world_size"),
    ],
)
def test_an_unknown_key_names_the_nearest(override: str, message: str, file: Path) -> None:
    assert message in refusal(file, override)


def test_an_unknown_key_of_an_attention_names_the_nearest_of_its_type(file: Path) -> None:
    message = refusal(file, "model.attention.type=diffusion", "model.attention.sampling_step=2")
    assert "unknown key model.attention.sampling_step: did you mean model.attention.sampling_steps?" in message
    message = refusal(file, "model.attention.type=dot_product", "model.attention.rank=8")
    assert "unknown key model.attention.rank: known: type" in message
    message = refusal(file, "model.attention.type=variational", "model.attention.mc_sampels=2")
    assert "unknown key model.attention.mc_sampels: did you mean model.attention.mc_samples?" in message


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["model.attention.type=variatonal"],
            f"type=variatonal is unknown: did you mean variational? use {TYPES}",
        ),
        (
            ["model.attention.type=7"],
            f"model.attention.type=7 is unknown: use {TYPES}",
        ),
        (
            ["model.attention.type=variational", "model.attention.rank=0"],
            "model.attention.rank=0: input should be greater than or equal to 1",
        ),
        (["training.epochs=many"], "training.epochs='many': input should be a valid integer"),
        (["loss.kind=hinge"], "loss.kind='hinge': input should be 'full', 'sampled', 'bce' or 'gbce'"),
        (["training.zero_stage=4"], "training.zero_stage=4: input should be 0, 1, 2 or 3"),
        (["model.dropout=1.0"], "model.dropout=1.0: input should be less than 1"),
        (["data.max_len=null"], "data.max_len=None: input should be a valid integer"),
        (["training=5"], "training=5: input should be a valid dictionary"),
        (["model.attention=dot"], "model.attention='dot'"),
    ],
)
def test_a_bad_value_is_told_with_what_may_stand_there(overrides: list[str], message: str, file: Path) -> None:
    assert message in refusal(file, *overrides)


def test_a_missing_section_says_how_to_give_it(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("model: {hidden_size: 8}")
    assert "data is missing: set it in the file or give data=VALUE" in refusal(path)
    assert "data.path is missing" in refusal(path, "data.max_len=4")
    path.write_text("data: {path: x}\nmodel:\n  attention: {rank: 3}")
    assert f"model.attention.type is missing: use {TYPES}" in refusal(path)


@pytest.mark.parametrize(
    ("overrides", "names", "mend"),
    [
        (
            ["table.kind=sharded", "table.optimizer=adam"],
            ["table.optimizer=adam", "loss.kind=full"],
            "use one of them, or loss.kind=sampled",
        ),
        (
            ["table.kind=sharded", "table.weight_decay=0.1"],
            ["table.weight_decay", "loss.kind=full"],
            "drop table.weight_decay",
        ),
        (
            ["table.kind=sharded", "loss.kind=bce", "training.accumulation_steps=2"],
            ["table.kind=sharded", "training.accumulation_steps"],
            "raise training.batch_sequences",
        ),
        (["table.learning_rate=0.1"], ["table.learning_rate", "table.kind=replicated"], "set training.learning_rate"),
        (
            ["training.precision=bf16", "training.zero_stage=0"],
            ["training.precision=bf16", "training.zero_stage=0"],
            "use training.zero_stage=1",
        ),
        (
            ["model.attention.type=variational", "model.attention.condition=last"],
            ["model.attention.condition=last", "data.targets=all"],
            "use condition=prefix, or data.targets=last",
        ),
        (["model.num_heads=3"], ["hidden_size=16", "num_heads=3"], "not a multiple"),
        (
            ["model.attention.type=diffusion", "model.attention.diffusion_steps=2"],
            ["sampling_steps=4", "diffusion_steps=2"],
            "set sampling_steps to at most 2",
        ),
        (
            [
                "model.attention.type=variational",
                "model.attention.form=matrix",
                "model.attention.query_projection=true",
            ],
            ["query_projection=true", "form=matrix"],
            "use form=factor, or query_projection=false",
        ),
        (
            ["model.attention.type=diffusion", "model.attention.form=matrix", "model.attention.query_projection=true"],
            ["query_projection=true", "form=matrix"],
            "use form=factor, or query_projection=false",
        ),
    ],
)
def test_a_combination_that_cannot_work_is_refused(
    overrides: list[str], names: list[str], mend: str, file: Path
) -> None:
    message = refusal(file, *overrides)
    for name in (*names, mend):
        assert name in message


@pytest.mark.parametrize(
    "overrides",
    [
        ["table.kind=sharded", "loss.kind=sampled", "table.learning_rate=0.1"],
        ["table.kind=sharded", "loss.kind=bce"],
        ["table.kind=sharded", "loss.kind=full", "training.accumulation_steps=2"],
        ["training.accumulation_steps=4"],
        ["training.precision=bf16", "training.zero_stage=3"],
        ["model.attention.type=variational", "model.attention.condition=last", "data.targets=last"],
        ["model.attention.type=variational", "model.attention.query_projection=true"],
        ["model.attention.type=diffusion", "model.attention.form=matrix", "model.attention.diffusion_steps=4"],
        *(["model.attention.type=diffusion", "model.attention.sampling_steps=1", f"model.attention.schedule={kind}",
           f"model.attention.diffusion_steps={steps}"] for steps in (1, 2, 50, 1000) for kind in ("linear", "cosine")),
    ],
)  # fmt: skip
def test_the_alternatives_that_errors_name_are_accepted(overrides: list[str], file: Path) -> None:
    assert isinstance(configuration.load(file, overrides), RunConfig)


def test_overrides_are_yaml_and_reach_any_depth(file: Path) -> None:
    config = configuration.load(
        file,
        [
            "model.attention.type=diffusion",
            "model.attention.eta=0.5",
            "training.max_seconds=null",
            "evaluation.exclude_seen=no",
            "training.learning_rate=1e-2",
            "data.path=s3://bucket/a=b",
            "table={kind: sharded, optimizer: sgd}",
            "loss.kind=sampled",
            "training.epochs=3",
            "training.epochs=4",
        ],
    )
    attention = config.model.attention
    assert isinstance(attention, configuration.DiffusionAttention)
    assert attention.eta == 0.5
    assert config.training.max_seconds is None
    assert config.evaluation.exclude_seen is False
    assert config.training.learning_rate == 0.01
    assert config.data.path == "s3://bucket/a=b"
    assert (config.table.kind, config.table.optimizer) == ("sharded", "sgd")
    assert config.training.epochs == 4  # the last one counts
    assert config.model.hidden_size == 16  # the file's


def test_overrides_create_sections(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    for text in ("{}", "data:\n", "data: {}\nmodel:\n"):
        path.write_text(text)
        config = configuration.load(path, ["data.path=x", "model.attention.type=variational"])
        assert (config.data.path, config.model.attention.type) == ("x", "variational")


@pytest.mark.parametrize("override", ["training.epochs", "=3", ""])
def test_an_override_without_key_or_value_is_refused(override: str, file: Path) -> None:
    assert f"override {override!r} is not of the form section.key=value" in refusal(file, override)


def test_an_override_below_a_value_is_refused(file: Path) -> None:
    assert "hidden_size is the value 16, not a section" in refusal(file, "model.hidden_size.x=3")


def test_an_override_that_is_no_yaml_is_refused(file: Path) -> None:
    assert "the value is not valid YAML; quote it" in refusal(file, "data.path=[a")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read config"),
        (b"- a\n- b\n", "holds list, not sections such as `data:` and `model:`"),
        (b"", "holds NoneType, not sections"),
        (b"data: [", "is not valid YAML"),
        (b"\xff\xfe\x00", "is not a text file in UTF-8"),
        (b"1: 2\ndata: {path: x}", "config"),
    ],
)
def test_a_file_that_is_no_configuration_is_named(content: bytes | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    if content is not None:
        path.write_bytes(content)
    assert message in refusal(path)
    assert "cannot read config" in refusal(tmp_path)  # a directory


@pytest.mark.parametrize("kind", ["dot_product", "variational", "diffusion"])
def test_what_is_dumped_loads_equal(kind: str, file: Path, tmp_path: Path) -> None:
    config = configuration.load(file, [f"model.attention.type={kind}", "training.max_seconds=9.5"])
    again = tmp_path / "again.yaml"
    again.write_text(configuration.dump(config))
    assert configuration.load(again) == config
    assert list(yaml.safe_load(again.read_text())) == list(RunConfig.model_fields)  # in full: no default is left out


_OTHERS = ("study_", "pipeline", "scaling", "benchmark")
RUNS = sorted(path for path in CONFIGS.glob("*.yaml") if not path.name.startswith(_OTHERS))


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.name)
def test_every_config_of_the_repository_loads(path: Path) -> None:
    configuration.load(path)


def test_the_attention_types_know_what_generates_and_what_reads_states(file: Path) -> None:
    def model(*overrides: str) -> Any:
        return configuration.load(file, [f"model.attention.{override}" for override in overrides]).model

    diffusion_hybrid = model("type=hybrid", "generator.type=diffusion", "generator.diffusion_steps=10")
    assert diffusion_hybrid.generative.diffusion_steps == 10
    assert model("type=variational").generative.type == "variational"
    assert model("type=deterministic").generative is None
    encoded = {name: model(f"type={name}").encoded for name in ("dot_product", "positional", "gru", "deterministic")}
    assert encoded == {"dot_product": False, "positional": False, "gru": True, "deterministic": True}
    with pytest.raises(GenattError, match=r"share_map=true with attention\.type=gru"):
        configuration.load(file, ["model.attention.type=gru", "model.share_map=true"])
    with pytest.raises(GenattError, match=r"generator\.condition=last with data\.targets=all"):
        model("type=hybrid", "generator.type=variational", "generator.condition=last")
    assert "unknown key model.attention.generator.rnk: did you mean model.attention.generator.rank?" in refusal(
        file,
        "model.attention.type=hybrid",
        "model.attention.generator.type=variational",
        "model.attention.generator.rnk=2",
    )


def test_inference_has_choices_of_its_own(file: Path) -> None:
    def chosen(kind: str, *changes: str) -> Any:
        overrides = [f"model.attention.{part}" for part in kind.split()]
        return configuration.for_inference(configuration.load(file, overrides), changes).model.generative

    assert chosen("type=variational", "inference=mc", "mc_samples=3").mc_samples == 3
    assert chosen("type=hybrid generator.type=diffusion", "sampling_steps=10").sampling_steps == 10
    for kind, change, message in [
        ("type=dot_product", "inference=mc", "no choice of inference of attention type dot_product: it has none"),
        ("type=variational", "rank=3", "of inference of attention type variational: it has inference, mc_samples"),
        ("type=diffusion", "sampling_steps=51", "sampling_steps=51 is more than diffusion_steps=50"),
    ]:
        with pytest.raises(GenattError, match=re.escape(message)):
            chosen(kind, change)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["type=diffusion", "rec_mix=0", "train_sampler=unrolled"], "train_sampler=unrolled with rec_mix=0"),
        (["type=diffusion", "rec_mix=0", "gamma=0"], "gamma=0 with rec_mix=0"),
        (["type=variational", "gamma=.inf"], "model.attention.gamma=inf"),
        (
            ["type=hybrid", "generator.type=variational", "generator.condition=last"],
            "model.attention.generator.condition=last with data.targets=all",
        ),
    ],
)
def test_attention_that_would_do_nothing_is_refused(file: Path, overrides: list[str], message: str) -> None:
    assert message in refusal(file, *(f"model.attention.{override}" for override in overrides))


def test_a_configuration_does_not_change_after_it_was_read(file: Path) -> None:
    config: Any = configuration.load(file)
    with pytest.raises(ValueError, match="frozen"):
        config.training.epochs = 7


def test_a_sharded_table_has_its_own_rate_or_the_dense_one(file: Path) -> None:
    sharded = ["table.kind=sharded", "loss.kind=sampled"]
    assert configuration.load(file, sharded).table_learning_rate == 0.01
    assert configuration.load(file, [*sharded, "table.learning_rate=0.5"]).table_learning_rate == 0.5
