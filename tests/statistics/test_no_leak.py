"""No row hears of a later item: every attention, every form, heads, a shared map, and every place of the item."""

import pytest
import torch

from genatt_dist.attention.noise import NoiseKey
from genatt_dist.config import ModelConfig
from genatt_dist.model.backbone import Backbone
from genatt_dist.model.context import Context
from genatt_dist.model.jagged import Jagged

WIDTH, LENGTHS = 8, (3, 6, 5)
CHANGED = 1  # the sequence whose items are changed, one after the other

SMALL = {"rank": 3, "latent_size": 4, "generator_size": 8}
SAMPLED = {"diffusion_steps": 4, "sampling_steps": 4, "eta": 1.0}
ATTENTIONS = {
    "dot_product": {"type": "dot_product"},
    "noisy_dot_product": {"type": "noisy_dot_product"},
    "positional": {"type": "positional", "value_projection": True},
    "gru": {"type": "gru"},
    "deterministic-factor": {"type": "deterministic", **SMALL, "query_projection": True},
    "deterministic-matrix": {"type": "deterministic", **SMALL, "form": "matrix"},
    "variational-factor": {"type": "variational", **SMALL, "decoder_input": "states_items", "value_projection": True},
    "variational-matrix": {"type": "variational", **SMALL, "form": "matrix", "decoder": "linear"},
    "variational-mc": {"type": "variational", **SMALL, "inference": "mc", "mc_samples": 3},
    "diffusion-factor": {"type": "diffusion", **SMALL, **SAMPLED},
    "diffusion-matrix": {"type": "diffusion", **SMALL, **SAMPLED, "form": "matrix"},
    "diffusion-literal": {"type": "diffusion", **SMALL, **SAMPLED, "literal": True},
    "hybrid-variational": {"type": "hybrid", "generator": {"type": "variational", **SMALL, "query_projection": True}},
    "hybrid-diffusion": {"type": "hybrid", "generator": {"type": "diffusion", **SMALL, **SAMPLED, "form": "matrix"}},
}


def backbone(attention: dict, **changes: object) -> Backbone:
    """Weights far from their initial values: zeros (biases, α) and small positions would hide what they do."""
    model = ModelConfig.model_validate({"hidden_size": WIDTH, "num_blocks": 2, "attention": attention, **changes})
    torch.manual_seed(0)
    result = Backbone(model, max_len=max(LENGTHS))
    for parameter in result.parameters():
        torch.nn.init.normal_(parameter.data, std=0.5)
    return result.eval()


CASES = [(name, share) for name in ATTENTIONS for share in (False, True) if not (name == "gru" and share)]


@pytest.mark.parametrize("sample", [False, True])
@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize(("name", "share_map"), CASES)
def test_a_changed_item_reaches_its_own_row_and_later_ones_only(name, heads, share_map, sample):
    model = backbone(ATTENTIONS[name], num_heads=heads, share_map=share_map)
    layout = Jagged.of(torch.tensor(LENGTHS), max(LENGTHS), sum(LENGTHS))
    noise = NoiseKey.make(5, 0, torch.arange(len(LENGTHS)), layout.row_N, layout.position_N)
    rows_ND = torch.randn(sum(LENGTHS), WIDTH)
    start = sum(LENGTHS[:CHANGED])
    with torch.no_grad():
        before_ND = model(rows_ND, Context.whole(layout, noise), sample).states_ND
        for position in range(LENGTHS[CHANGED]):
            changed_ND = rows_ND.clone()
            changed_ND[start + position] = torch.randn(WIDTH)
            after_ND = model(changed_ND, Context.whole(layout, noise), sample).states_ND
            moved_N = (after_ND != before_ND).any(1)
            reached_N = (layout.row_N == CHANGED) & (layout.position_N >= position)
            assert torch.equal(moved_N, reached_N), f"item {position}"
