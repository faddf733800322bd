"""V-GenAtt: it contains dot-product attention, its mean draws nothing, and its samples are those of its law."""

import pytest
import torch

from genatt_dist.attention.attend import attend, attention_map
from genatt_dist.attention.dot_product import DotProduct
from genatt_dist.attention.variational import Variational
from genatt_dist.config import ModelConfig, VariationalAttention


def model_of(attention, heads=1, width=8):
    return ModelConfig(hidden_size=width, num_heads=heads, num_blocks=1, attention=attention)


@pytest.mark.parametrize("heads", [1, 2])
def test_inclusion_of_dot_product_attention(heads, make_context):
    """MATH §7.1: factor form, linear decoder of [z; S; X], r = d/H, κ = 1, b = 0, z = μ, W_Q and W_K copied."""
    context, d = make_context(5, 3, 1), 8
    config = VariationalAttention(
        rank=d // heads, latent_size=3, decoder="linear", decoder_input="states_items", value_projection=True
    )
    generator = Variational(model_of(config, heads), config, 5, 0).eval()
    dot = DotProduct(model_of(config, heads))
    torch.nn.init.normal_(dot.w_q.bias)
    with torch.no_grad():
        generator.decoder.output.weight.zero_()
        generator.decoder.output.weight[..., 3 + d :] = dot.w_q.weight.view(heads, -1, d)
        generator.decoder.output.bias.copy_(dot.w_q.bias.view(heads, -1))
        generator.logits.w_v.weight.zero_()
        generator.logits.w_v.weight[:, d:] = dot.w_k.weight
        generator.values.w_value.weight.copy_(dot.w_v.weight)
    x, s = torch.randn(2, 9, d)
    got, expected = generator(x, s, context), dot(x, None, context)
    maps = [attention_map(generated, context.layout) for generated in (got, expected)]
    torch.testing.assert_close(*maps, atol=1e-6, rtol=0)
    outputs = [attend(generated, context.layout) for generated in (got, expected)]
    torch.testing.assert_close(*outputs, atol=1e-6, rtol=0)


@pytest.mark.parametrize("form", ["factor", "matrix"])
def test_mc_is_the_mean_of_its_samples(form, make_context):
    """Its maps are those of M draws, and no two of them are equal."""
    context = make_context(5, 3)
    config = VariationalAttention(form=form, rank=4, latent_size=3, generator_size=6, inference="mc", mc_samples=4)
    generator = Variational(model_of(config), config, 5, 0).eval()
    x, s = torch.randn(2, 8, 8)
    generated = generator(x, s, context)
    assert len(generated.samples) == 4
    maps = [
        attention_map(type(generated)((sample,), generated.value_NHE, generated.loss), context.layout)
        for sample in generated.samples
    ]
    torch.testing.assert_close(attention_map(generated, context.layout), torch.stack(maps).mean(0))
    assert all((a - b).abs().max() > 1e-4 for i, a in enumerate(maps) for b in maps[:i])


def test_values_are_the_tokens_unless_projected(make_context):
    config = VariationalAttention(rank=4, latent_size=3)
    generator = Variational(model_of(config, heads=2), config, 5, 0).eval()
    x, s = torch.randn(2, 8, 8)
    assert torch.equal(generator(x, s, make_context(5, 3)).value_NHE.flatten(1), x)


def test_kappa_is_applied_after_the_query_projection(make_context):
    config = VariationalAttention(rank=4, latent_size=3, query_projection=True)
    generator, context = Variational(model_of(config, heads=2), config, 5, 0).eval(), make_context(5, 3)
    x, s = torch.randn(2, 8, 8)
    before = generator(x, s, context).samples[0].query_MHR
    generator.logits.kappa.value.data = torch.tensor([2.0, 3.0])
    after = generator(x, s, context).samples[0].query_MHR
    torch.testing.assert_close(after, before * torch.tensor([2.0, 3.0])[:, None])


def test_a_query_projection_of_offset_logits_is_refused():
    with pytest.raises(ValueError, match="query_projection=true with form=matrix"):
        VariationalAttention(form="matrix", query_projection=True)
