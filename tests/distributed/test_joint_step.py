"""The joint step on two ranks is plain PyTorch on one: layers under DeepSpeed and rows under TorchRec follow one loss.

Differences are bounded by rounding (sums are taken in another order); clipping is off, as the contract says.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import ranks
from joint_runs import by_plain_pytorch, by_product

from genatt_dist.config import RunConfig

pytestmark = pytest.mark.distributed

_SMALL = "rank: 4, latent_size: 6, generator_size: 12"
DOT = "model.attention={type: dot_product}"
VARIATIONAL = f"model.attention={{type: variational, {_SMALL}}}"
VARIATIONAL_SAMPLES = f"model.attention={{type: variational, {_SMALL}, train_samples: 2, decoder_input: states_items}}"
VARIATIONAL_LAST = f"model.attention={{type: variational, {_SMALL}, condition: last, value_projection: true}}"
DIFFUSION = f"model.attention={{type: diffusion, {_SMALL}, diffusion_steps: 6}}"
DIFFUSION_MATRIX = f"model.attention={{type: diffusion, {_SMALL}, diffusion_steps: 6, form: matrix}}"
DIFFUSION_UNROLLED = (
    f"model.attention={{type: diffusion, {_SMALL}, diffusion_steps: 3, sampling_steps: 2, train_sampler: unrolled}}"
)
POSITIONAL = "model.attention={type: positional}"
GRU = "model.attention={type: gru}"
NOISY = "model.attention={type: noisy_dot_product}"
DETERMINISTIC = f"model.attention={{type: deterministic, {_SMALL}}}"
HYBRID_VARIATIONAL = f"model.attention={{type: hybrid, generator: {{type: variational, {_SMALL}}}}}"
HYBRID_MATRIX = f"model.attention={{type: hybrid, generator: {{type: diffusion, {_SMALL}, form: matrix}}}}"

BCE = "loss.kind=bce"
GBCE = "loss.kind=gbce"
POPULARITY = "loss.proposal=popularity"
IN_BATCH = "loss.proposal=in_batch"
OWN = "loss.shared=false"
FULL = "loss.kind=full"
REPLICATED = "table.kind=replicated"
LAST = "data.targets=last"
SGD, ADAGRAD = "table.optimizer=sgd", "table.optimizer=rowwise_adagrad"
TOLERANCE = 1e-6


def _stage(stage: int) -> str:
    return f"training.zero_stage={stage}"


def _claim(config: RunConfig, expected: RunConfig | None = None, tolerance: float = TOLERANCE) -> None:
    """Two ranks of `config` leave the losses, dense tensors and rows that plain PyTorch leaves with `expected`."""
    reference = by_plain_pytorch(expected or config)
    first, second = ranks.run_in_group(by_product, 2, config)
    assert np.isfinite(reference.losses).all()
    np.testing.assert_array_equal(first.table, second.table)
    np.testing.assert_array_equal(first.losses, second.losses)
    differences = first.difference(reference)
    print("largest differences of losses, dense tensors, rows:", *(f"{value:.1e}" for value in differences))
    assert max(differences) <= tolerance


def _cases(*cases: tuple[str, ...]) -> pytest.MarkDecorator:
    """Parametrised by overrides, named by their values."""

    def name(overrides: tuple[str, ...]) -> str:
        return "-".join(
            override.partition("=")[2].removeprefix("{type: ").partition(",")[0].rstrip("}") for override in overrides
        )

    return pytest.mark.parametrize("overrides", cases, ids=map(name, cases))


@_cases(
    (DOT, ADAGRAD, _stage(0)),
    (DOT, SGD, BCE, _stage(1)),
    (DOT, SGD, POPULARITY, LAST, _stage(2)),
    (DOT, ADAGRAD, BCE, _stage(3)),
    (VARIATIONAL, SGD, POPULARITY, _stage(0)),
    (VARIATIONAL_SAMPLES, ADAGRAD, BCE, _stage(1)),
    (VARIATIONAL_LAST, ADAGRAD, LAST, "model.dropout=0", _stage(2)),
    (VARIATIONAL, ADAGRAD, POPULARITY, _stage(3)),
    (DIFFUSION_MATRIX, SGD, BCE, _stage(0)),
    (DIFFUSION, ADAGRAD, _stage(1)),
    (DIFFUSION_UNROLLED, SGD, _stage(2)),
    (DIFFUSION, SGD, POPULARITY, _stage(3)),
    (DOT, ADAGRAD, IN_BATCH, LAST, _stage(1)),
    (DOT, SGD, OWN, "loss.temperature=0.5", _stage(2)),
    (VARIATIONAL_SAMPLES, ADAGRAD, GBCE, _stage(1)),
)
def test_sharded_table_and_dense_layers_follow_plain_pytorch(
    make_config: Callable[..., RunConfig], overrides: tuple[str, ...]
) -> None:
    _claim(make_config(*overrides))


@_cases(
    (DOT, _stage(0)),
    (DOT, _stage(1)),
    (VARIATIONAL_SAMPLES, _stage(2)),
    (DIFFUSION, _stage(3)),
    (DOT, LAST, _stage(3)),
)
def test_full_softmax_over_a_replicated_table_follows_plain_pytorch(
    make_config: Callable[..., RunConfig], overrides: tuple[str, ...]
) -> None:
    _claim(make_config(REPLICATED, FULL, *overrides))


@_cases((DOT, _stage(0)), (DIFFUSION, _stage(1)), (VARIATIONAL, _stage(2)), (DOT, _stage(3)))
def test_adamw_follows_plain_pytorch(make_config: Callable[..., RunConfig], overrides: tuple[str, ...]) -> None:
    """The bound is looser: AdamW divides a gradient by the root of its own square, so where a gradient is nearly zero
    its rounding error, which depends on the order of sums, becomes part of a step as long as the learning rate.
    """
    adamw = ("training.optimizer=adamw", "training.learning_rate=0.002", "training.weight_decay=0.1")
    _claim(make_config(*adamw, *overrides, "table.learning_rate=0.1"), tolerance=5e-5)


@_cases((DOT, IN_BATCH, _stage(1)), (DIFFUSION, BCE, _stage(2)))
def test_sharded_table_on_two_ranks_is_the_replicated_one_on_one(
    make_config: Callable[..., RunConfig], overrides: tuple[str, ...]
) -> None:
    """With the sampled losses, and SGD at one rate for rows and dense layers."""
    _claim(make_config(SGD, *overrides), expected=make_config(REPLICATED, *overrides))


@_cases((DOT, _stage(1)), (DIFFUSION, _stage(0)), (VARIATIONAL, "loss.kind=sampled", _stage(2)), (DOT, _stage(3)))
def test_two_accumulated_batches_are_one_batch_of_both(
    make_config: Callable[..., RunConfig], overrides: tuple[str, ...]
) -> None:
    """The reference sums the gradients of two global batches, each divided by the tokens of both."""
    _claim(make_config(REPLICATED, FULL, "training.accumulation_steps=2", "training.batch_sequences=12", *overrides))


SHARED = "model.share_map=true"


@_cases(
    (POSITIONAL, _stage(3)),
    (GRU, _stage(3)),
    (NOISY, _stage(3), SHARED),
    (DETERMINISTIC, _stage(2)),
    (HYBRID_VARIATIONAL, _stage(3), SHARED),
    (HYBRID_MATRIX, _stage(3)),
    (DIFFUSION, _stage(3), SHARED),
)
def test_controls_hybrids_and_shared_maps_follow_plain_pytorch(
    make_config: Callable[..., RunConfig], overrides: tuple[str, ...]
) -> None:
    """With parameters partitioned where the stage does so: each must be whole when its gradient arrives."""
    _claim(make_config(SGD, POPULARITY, *overrides))


@_cases((VARIATIONAL,), (DIFFUSION,))
def test_bfloat16_stays_near_float32(make_config: Callable[..., RunConfig], overrides: tuple[str, ...]) -> None:
    """Losses within 2 % over all steps, and ς, a running mean of about a hundred batches, is kept in float32."""
    config = make_config("training.precision=bf16", *overrides)
    expected = by_plain_pytorch(make_config(*overrides))
    found, _ = ranks.run_in_group(by_product, 2, config)
    relative = np.abs(found.losses / expected.losses - 1).max(0)
    print("largest relative differences of losses:", *(f"{value:.1e}" for value in relative))
    assert (relative <= 0.02).all()
    scales = {name: value for name, value in found.dense.items() if name.endswith("residual_scale.mean_square")}
    assert len(scales) == (2 if overrides == (DIFFUSION,) else 0)
    for name, value in scales.items():
        assert value.dtype == np.float32
        assert not _representable_in_bfloat16(value), name


def _representable_in_bfloat16(value: np.ndarray) -> bool:
    """Whether a float32 is one whose lower 16 bits are zero."""
    return not value.view(np.uint32) & 0xFFFF
