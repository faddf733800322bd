"""One warning a sign and run, with its number, its place and the mend; none for weights that are still fresh."""

import json
import math
from pathlib import Path

import pytest

from genatt_dist import config as configuration
from genatt_dist.config import RunConfig
from genatt_dist.training.telemetry import Telemetry
from genatt_dist.training.warnings import NOT_FINITE, FailureSigns, signs

TOTAL_STEPS = 1000
HEALTHY = {
    "attention_entropy": 0.85, "total_variation": 0.1, "between_users": 0.7, "kl_mean": 0.06, "active_units": 30.0,
    "kappa": 1.2, "residual_scale": 0.5, "alpha_bar_T": 4.3e-5,
}  # fmt: skip


def run_config(kind: str = "variational", **options: object) -> RunConfig:
    attention = {"type": kind, **options}
    return configuration.parse({"data": {"path": "x"}, "model": {"attention": attention}}, "of a test")


def record(epoch: int = 5, block: int = 0, **changes: float) -> dict[str, object]:
    """An evaluation in which only `changes`, of one block of two, are out of the ordinary."""
    values = {f"{name}/block{index}": value for name, value in HEALTHY.items() for index in range(2)}
    values |= {f"{name}/block{block}": value for name, value in changes.items()}
    return {"kind": "valid", "epoch": epoch, "step": 100 * epoch, "ndcg@10": 0.05, **values}


SIGNS = [
    (
        "variational",
        {"kl_mean": 0.004},
        "posterior collapse",
        ["0.004", "0.01", "free_bits (now 0.05)", "gamma_warmup"],
    ),
    ("variational", {"active_units": 3.0}, "posterior collapse", ["9%", "10%", "decoder_input=latent"]),
    ("dot_product", {"attention_entropy": 0.991}, "over-smoothing", ["0.991", "0.98", "training.learning_rate"]),
    ("variational", {"attention_entropy": 0.991}, "over-smoothing", ["query_projection=true", "states_items"]),
    ("variational", {"total_variation": 0.013}, "determinism", ["0.013", "0.02", "train_samples (now 1)"]),
    ("diffusion", {"total_variation": 0.013}, "determinism", ["sampling_steps (now 4)", "rec_mix (now 0.5)"]),
    ("noisy_dot_product", {"total_variation": 0.013}, "determinism", ["raise model.attention.noise (now 1.0)"]),
    ("variational", {"between_users": 0.06}, "pure noise", ["6%", "10%", "decoder_input=states_items"]),
    ("noisy_dot_product", {"between_users": 0.06}, "pure noise", ["lower model.attention.noise"]),
    ("diffusion", {"residual_scale": 0.003}, "vanishing residual scale", ["0.003", "0.01", "gamma (now 1.0)"]),
    ("diffusion", {"residual_scale": 1.7}, "exploding residual scale", ["1.70", "1.4", "latent_weight (now 0.5)"]),
    ("diffusion", {"kappa": 31.0}, "exploding kappa", ["31.0", "20", "gradient_clipping"]),
    ("variational", {"kappa": -0.2}, "negative kappa", ["-0.2", "below 0"]),
    ("diffusion", {"alpha_bar_T": 0.6}, "signal at the end of diffusion", ["0.6", "0.001", "schedule=linear"]),
    ("diffusion", {"alpha_bar_T": 0.0}, "no signal at the end of diffusion", ["schedule=linear"]),
    ("variational", {"total_variation": math.nan}, NOT_FINITE, ["total_variation is nan", "training.learning_rate"]),
]


@pytest.mark.parametrize(("kind", "changes", "name", "parts"), SIGNS)
def test_each_sign_names_number_place_threshold_and_remedy(
    kind: str, changes: dict[str, float], name: str, parts: list[str]
) -> None:
    (sign,) = signs(run_config(kind).model, record(block=1, **changes))
    (value,) = changes.values()
    assert (sign.name, sign.block) == (name, 1)
    assert "in block 1" in sign.text
    assert "Remedy: " in sign.text
    assert sign.text.endswith(".")
    assert [part for part in parts if part not in sign.text] == []
    if name != NOT_FINITE:
        assert sign.value == (value / 32 if "active_units" in changes else value)


@pytest.mark.parametrize("kind", ["dot_product", "variational", "diffusion", "hybrid", "gru", "noisy_dot_product"])
def test_a_healthy_evaluation_has_no_sign(kind: str) -> None:
    assert signs(run_config(kind).model, record()) == []


def test_options_of_a_hybrid_are_named_where_they_are() -> None:
    (sign,) = signs(run_config("hybrid", generator={"type": "diffusion", "eta": 0.5}).model, record(total_variation=0))
    assert "raise model.attention.generator.eta (now 0.5)" in sign.text


def test_the_worst_block_is_told_and_the_others_named() -> None:
    values = record(kl_mean=0.008) | {"kl_mean/block1": 0.002}
    (sign,) = signs(run_config().model, values)
    assert (sign.block, sign.value) == (1, 0.002)
    assert "in block 1 (also in block 0)" in sign.text


def test_one_head_that_went_astray_is_seen_behind_a_good_mean() -> None:
    values = record(kappa=1.0) | {"kappa_per_head/block0": [2.5, -0.5]}
    (sign,) = signs(run_config().model, values)
    assert (sign.name, sign.value) == ("negative kappa", -0.5)


def test_a_sign_is_told_once_and_only_when_it_stands_twice() -> None:
    watch = FailureSigns(run_config(), TOTAL_STEPS)
    bad = {"kl_mean": 0.004}
    told = [
        watch.look(record(epoch, **(bad if epoch in (3, 5, 6, 7, 9, 10) else {})), last=False) for epoch in range(1, 11)
    ]
    assert [[sign.name for sign in new] for new in told] == [
        ["posterior collapse"] if epoch == 6 else [] for epoch in range(1, 11)
    ]


def test_fresh_weights_are_left_in_peace() -> None:
    """Two evaluations after the warm-up of γ (here until step 450) and the first epoch; a broken number at once."""
    watch = FailureSigns(run_config(gamma_warmup=0.45), TOTAL_STEPS)
    told = [bool(watch.look(record(epoch, attention_entropy=0.999), last=False)) for epoch in range(1, 7)]
    assert told == [False, False, False, False, False, True]
    watch = FailureSigns(run_config("dot_product"), TOTAL_STEPS)
    told = [bool(watch.look(record(epoch, attention_entropy=0.999), last=False)) for epoch in range(1, 4)]
    assert told == [False, False, True]
    watch = FailureSigns(run_config("dot_product"), TOTAL_STEPS)
    assert [sign.name for sign in watch.look(record(1, attention_entropy=math.nan), last=False)] == [NOT_FINITE]


def test_at_the_end_of_training_once_is_enough() -> None:
    """A run that is evaluated once, at its end, would never be warned otherwise; one of a single epoch is fresh."""
    assert FailureSigns(run_config(), TOTAL_STEPS).look(record(5, between_users=0.01), last=True)
    assert not FailureSigns(run_config(), TOTAL_STEPS).look(record(1, between_users=0.01), last=True)


def test_a_resumed_run_repeats_nothing_and_remembers_the_evaluation_before(tmp_path: Path) -> None:
    bad = {"kl_mean": 0.004}

    def evaluate(watch: FailureSigns, telemetry: Telemetry, epoch: int) -> list[str]:
        values = record(epoch, **bad, total_variation=0.001 if epoch > 2 else 0.1)
        telemetry.record("valid", values["step"], {k: v for k, v in values.items() if k not in ("kind", "step")})
        new = watch.look(values, last=False)
        for sign in new:
            telemetry.warn(values["step"], sign)
        return [sign.name for sign in new]

    with Telemetry(tmp_path, "x", TOTAL_STEPS, active=True) as telemetry:
        watch = FailureSigns(run_config(), TOTAL_STEPS, telemetry.records())
        undisturbed = [evaluate(watch, telemetry, epoch) for epoch in range(1, 6)]
    assert undisturbed == [[], [], ["posterior collapse"], ["determinism"], []]
    whole = (tmp_path / "metrics.jsonl").read_text()
    for checkpoint in (2, 3, 4):  # each time stopped in the epoch after it, and resumed
        (tmp_path / "metrics.jsonl").write_text(whole)
        with Telemetry(tmp_path, "x", TOTAL_STEPS, active=True, first_step=100 * checkpoint) as telemetry:
            watch = FailureSigns(run_config(), TOTAL_STEPS, telemetry.records())
            resumed = [evaluate(watch, telemetry, epoch) for epoch in range(checkpoint + 1, 6)]
        assert resumed == undisturbed[checkpoint:]
        lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
        assert [line["sign"] for line in lines if line["kind"] == "warning"] == ["posterior collapse", "determinism"]
