"""What the profile of a step counts: every matrix product, and attention alike whatever makes the map."""

import pytest
import torch
from torch.nn import functional as F

from benchmarks.profile import KINDS, OTHERS, flops, kind, measured
from benchmarks.steps.grid import Variant

B, H, N, E = 2, 3, 5, 4


def test_a_linear_layer_is_two_operations_a_weight_and_row_three_times_over() -> None:
    layer, rows = torch.nn.Linear(3, 5), torch.randn(7, 3, requires_grad=True)
    assert flops(lambda: layer(rows)) == 2 * 7 * 3 * 5
    assert flops(lambda: layer(rows).sum().backward()) == 3 * (2 * 7 * 3 * 5)


@pytest.mark.parametrize("masked", [False, True])
def test_attention_counts_with_a_map_of_its_own_as_with_a_generated_one(masked: bool) -> None:
    """Two products forward, four backward; a mask of the map's logits adds none."""
    query, key, value = (torch.randn(B, H, N, E, requires_grad=True) for _ in range(3))
    mask = torch.randn(B, H, N, N, requires_grad=True) if masked else None
    one = 2 * B * H * N * N * E

    def attend() -> torch.Tensor:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=not masked)

    assert flops(attend) == 2 * one
    assert flops(lambda: attend().sum().backward()) == 6 * one


@pytest.mark.parametrize(
    ("operation", "expected"),
    [
        ("addmm", "matrix products"),
        ("_scaled_dot_product_flash_attention_for_cpu_backward", "attention"),
        ("bitwise_xor_", "keyed noise"),
        ("log_", "keyed noise"),
        ("logsumexp", OTHERS),
        ("_log_softmax", OTHERS),
        ("cosine_similarity", OTHERS),
        ("gelu_backward", "GELU, norm"),
        ("copy_", OTHERS),
    ],
)
def test_operations_are_of_the_kind_they_are(operation: str, expected: str) -> None:
    assert kind(operation) == expected


def test_the_kinds_cover_a_step() -> None:
    variant = Variant("training", "variational", form="factor", max_len=4, batch=4, softmax=False)
    row = measured(variant, torch.device("cpu"))
    assert row["shares_of_time"].keys() == {*KINDS, OTHERS}
    assert sum(row["shares_of_time"].values()) == pytest.approx(1, abs=0.01)
    assert row["operations"] > 100
