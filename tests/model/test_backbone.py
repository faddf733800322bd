"""A row depends on its own past and noise: no later item, padding, neighbour or split of the batch changes it."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from model_cases import ATTENTIONS, GENERATIVE, LENGTHS, RANDOM, Parts, backbone, context, rows

from genatt_dist.attention import noise
from genatt_dist.attention.attend import attention_map
from genatt_dist.model.context import Context

DIFFUSES = 1  # a step in whose draws some sequences are diffused and some are not
SHAPES = [(1, 1), (1, 2), (2, 1), (2, 2)]

every_attention = pytest.mark.parametrize("name", ATTENTIONS)
every_shape = pytest.mark.parametrize(("heads", "blocks"), SHAPES)


def warmed(model, xs):
    """The model after one training batch, so that ς is set, in training mode."""
    model.train()(torch.cat(xs), context(step=99))
    return model


@every_attention
@every_shape
@pytest.mark.parametrize("training", [False, True])
def test_later_items_change_no_earlier_row(name, heads, blocks, training):
    xs = rows()
    model = warmed(backbone(name, heads, blocks), xs).train(training)
    frozen = copy.deepcopy(model)
    before = model(torch.cat(xs), context()).states_ND
    changed, position = 2, 4
    xs[changed][position:] = 3.0
    after = frozen(torch.cat(xs), context()).states_ND
    same = torch.ones(sum(LENGTHS), dtype=torch.bool)
    start = sum(LENGTHS[:changed])
    same[start + position : start + LENGTHS[changed]] = False
    assert torch.equal(before[same], after[same])
    assert (before[~same] - after[~same]).abs().amax(1).min() > 0


@every_attention
def test_contents_of_other_sequences_change_nothing(name):
    """Only real tokens are stored, so what stands beside a sequence is other sequences, never other padding."""
    xs = rows()
    model = backbone(name).eval()
    before = model(torch.cat(xs), context()).states_ND
    xs[2][:] = -1.0
    after = model(torch.cat(xs), context()).states_ND
    assert torch.equal(before[:6], after[:6])
    assert torch.equal(before[14:], after[14:])


@every_attention
def test_a_wider_batch_and_more_sequences_change_nothing(name):
    xs = rows((3, 2))
    model = backbone(name).eval()
    alone = model(torch.cat(xs), context((3, 2))).states_ND
    again = model(torch.cat(xs), context((3, 2))).states_ND
    wider = model(torch.cat(xs), context((3, 2), width=8)).states_ND
    longer = model(torch.cat([*xs, rows((7,))[0]]), context((3, 2, 7))).states_ND
    assert torch.equal(alone, again)
    torch.testing.assert_close(wider, alone, atol=1e-6, rtol=0)
    torch.testing.assert_close(longer[:5], alone, atol=1e-6, rtol=0)


@every_attention
@pytest.mark.parametrize("training", [False, True])
def test_the_order_of_sequences_changes_nothing(name, training):
    xs = rows()
    model = warmed(backbone(name), xs).train(training).double()
    xs = [x.double() for x in xs]
    permuted, order = copy.deepcopy(model), (2, 0, 3, 1)
    states = torch.split(model(torch.cat(xs), context()).states_ND, LENGTHS)
    lengths = tuple(LENGTHS[i] for i in order)
    output = permuted(torch.cat([xs[i] for i in order]), context(lengths, windows=order))
    for got, i in zip(torch.split(output.states_ND, lengths), order, strict=True):
        torch.testing.assert_close(got, states[i], atol=1e-6, rtol=0)


def train_two_steps(model, xs, contexts):
    """Loss shares, states and summed gradients of two steps; the second one uses the ς that the first one left."""
    losses, states = [], []
    for one in contexts:
        output = model(xs, one)
        loss = output.states_ND.cumsum(-1).square().sum() / one.num_tokens + output.generative_loss
        loss.backward()
        losses.append(output.generative_loss.detach())
        states.append(output.states_ND.detach())
    return (
        torch.stack(losses),
        torch.cat(states, -1),
        {n: p.grad for n, p in model.named_parameters() if p.grad is not None},
    )


@every_attention
@pytest.mark.parametrize("heads", [1, 2])
def test_two_parts_add_up_to_the_whole_batch(name, heads):
    xs = [x.double() for x in rows()]
    whole = backbone(name, heads).double().train()
    halves = [copy.deepcopy(whole) for _ in range(2)]
    losses, states, gradients = train_two_steps(whole, torch.cat(xs), [context(step=step) for step in (0, 1)])

    split, parts = ((0, 1, 3), (2,)), Parts(2)

    def run(part):
        ids = split[part]
        lengths = tuple(LENGTHS[i] for i in ids)
        contexts = [
            context(lengths, ids, step=step, num_tokens=sum(LENGTHS), total=parts.total(part)) for step in (0, 1)
        ]
        return train_two_steps(halves[part], torch.cat([xs[i] for i in ids]), contexts)

    with ThreadPoolExecutor(2) as pool:
        (losses_a, states_a, gradients_a), (losses_b, states_b, gradients_b) = pool.map(run, (0, 1))

    by_sequence = torch.split(states, LENGTHS)
    torch.testing.assert_close(states_a, torch.cat([by_sequence[i] for i in split[0]]), atol=1e-6, rtol=0)
    torch.testing.assert_close(states_b, by_sequence[2], atol=1e-6, rtol=0)
    torch.testing.assert_close(losses_a + losses_b, losses, atol=1e-6, rtol=0)
    for key, gradient in gradients.items():
        torch.testing.assert_close(gradients_a[key] + gradients_b[key], gradient, atol=1e-6, rtol=1e-6)


@every_attention
def test_no_two_draws_share_a_key(name, monkeypatch):
    keys = []
    bits = noise.bits
    monkeypatch.setattr(noise, "bits", lambda key, count: keys.append(key.flatten()) or bits(key, count))
    model = backbone(name, heads=2)
    model.train()(torch.cat(rows()), context())
    # One draw is meant to be shared: how a sequence is ranked, by both blocks.
    diffuses = name.startswith("diffusion") or name in ("hybrid-matrix", "hybrid-diffusion")
    shared = len(LENGTHS) if diffuses else 0
    drawn = torch.cat(keys)
    assert drawn.unique().numel() == drawn.numel() - shared
    keys.clear()
    model.eval()(torch.cat(rows()), context())
    assert bool(keys) == (name in RANDOM)
    drawn = torch.cat([torch.empty(0, dtype=torch.long), *keys])
    assert drawn.unique().numel() == drawn.numel()


@every_attention
def test_bfloat16_parameters_train(name):
    model = backbone(name).bfloat16().train()
    for step in (0, 1):
        output = model(torch.cat(rows()).bfloat16(), context(step=step))
        (output.states_ND.float().square().mean() + output.generative_loss).backward()
    assert output.states_ND.dtype == torch.bfloat16
    assert output.generative_loss.dtype == torch.float32
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    assert torch.isfinite(model.eval()(torch.cat(rows()).bfloat16(), context()).states_ND).all()


@every_attention
def test_every_parameter_learns(name):
    """From one training step with both losses, whichever way each sequence is ranked."""
    model = backbone(name, heads=2).train()
    output = model(torch.cat(rows()), context(step=DIFFUSES))
    (output.states_ND.cumsum(-1).square().mean() + output.generative_loss).backward()
    still = [key for key, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert still == []


@every_attention
@pytest.mark.parametrize("training", [False, True])
def test_parameters_are_used_only_inside_their_modules_forward(name, training):
    """Partitioned parameters exist only while the forward of the module that owns them runs."""
    model = backbone(name).train(training)
    with torch.no_grad():
        expected = copy.deepcopy(model)(torch.cat(rows()), context())

    def hide(module, *_):
        for parameter in module.parameters(recurse=False):
            parameter.kept = parameter.detach().clone()
            parameter.data.fill_(torch.nan)

    def show(module, _):
        for parameter in module.parameters(recurse=False):
            parameter.data.copy_(parameter.kept)

    for module in model.modules():
        hide(module)
        module.register_forward_pre_hook(show)
        module.register_forward_hook(hide)
    with torch.no_grad():
        output = model(torch.cat(rows()), context())
    torch.testing.assert_close(output.states_ND, expected.states_ND, atol=0, rtol=0)
    torch.testing.assert_close(output.generative_loss, expected.generative_loss, atol=0, rtol=0)


@every_attention
@pytest.mark.parametrize("shared", [False, True])
def test_modules_with_parameters_of_their_own_return_bare_tensors(name, shared):
    """Partitioned parameters are gathered for the backward through the tensors that a forward returns, and none is
    found inside a dataclass."""
    if shared and name == "gru":
        pytest.skip("the GRU control has no map to share")
    model, strangers = backbone(name, share_map=shared).train(), []

    def look(module, _, output):
        if not all(isinstance(part, torch.Tensor) for part in (output if isinstance(output, tuple) else (output,))):
            strangers.append(type(module).__name__)

    for module in model.modules():
        if any(True for _ in module.parameters(recurse=False)):
            module.register_forward_hook(look)
    model(torch.cat(rows()), context())
    assert strangers == []


@every_attention
def test_rows_of_a_map_sum_to_one_over_the_past(name):
    model, one = backbone(name, heads=2).eval(), context()
    for generated in model(torch.cat(rows()), one).maps if name != "gru" else ():
        a = attention_map(generated, one.layout)
        assert a.shape == (4, 2, 8, 8)
        assert (a.triu(1) == 0).all()
        real = one.layout.pad(torch.ones(sum(LENGTHS)))[:, None].expand(-1, 2, -1)
        torch.testing.assert_close(a.sum(-1), real)


@every_attention
@every_shape
@pytest.mark.parametrize("shared", [False, True])
def test_last_states_are_those_of_the_last_tokens(name, heads, blocks, shared):
    if shared and name == "gru":
        pytest.skip("the GRU control has no map to share")
    model, one = warmed(backbone(name, heads, blocks, share_map=shared), rows()).eval(), context()
    expected = model(torch.cat(rows()), one).states_ND[one.layout.last_B]
    torch.testing.assert_close(model.last_states(torch.cat(rows()), one), expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize("name", [name for name in ATTENTIONS if name != "gru"])
def test_a_shared_map_is_made_once_and_used_with_values_of_each_block(name):
    model, one = backbone(name, heads=2, share_map=True), context(step=DIFFUSES)
    output = model.train()(torch.cat(rows()), one)
    (output.states_ND.cumsum(-1).square().mean() + output.generative_loss).backward()
    assert len(output.maps) == 1
    assert model.blocks[1].attention is None
    assert [key for key, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []
    seen = []
    model.blocks[1].values.register_forward_hook(lambda _, arguments, value: seen.append((*arguments, value)))
    output = model.eval()(torch.cat(rows()), one)
    ((x, value),) = seen
    a = attention_map(output.maps[0], one.layout)
    mixed = one.layout.unpad((a @ one.layout.pad(value).transpose(1, 2)).transpose(1, 2)).flatten(1)
    block = model.blocks[1]
    after = block.attention_norm(x + block.w_o(mixed))
    after = block.feed_forward_norm(after + block.w_b(torch.nn.functional.gelu(block.w_a(after))))
    torch.testing.assert_close(output.states_ND, after, atol=2e-6, rtol=0)


def without_noise(one: Context) -> Context:
    return Context(one.layout, None, num_tokens=one.num_tokens)


@pytest.mark.parametrize("form", ["factor", "matrix"])
def test_mean_inference_draws_nothing_and_repeats(form):
    model = backbone("variational-factor", form=form, inference="mean", query_projection=False).eval()
    first = model(torch.cat(rows()), without_noise(context())).states_ND
    second = model(torch.cat(rows()), context(step=5)).states_ND
    assert torch.equal(first, second)


@every_attention
def test_missing_noise_is_named(name):
    model = backbone(name)
    with pytest.raises(ValueError, match=r"dropout in training mode draws random numbers, but context\.noise is None"):
        model.train()(torch.cat(rows()), without_noise(context()))
    if name in RANDOM:
        with pytest.raises(ValueError, match=r"sampling .*context\.noise is None"):
            model.eval()(torch.cat(rows()), without_noise(context()))


@pytest.mark.parametrize("name", GENERATIVE)
def test_a_generative_loss_exists_in_training_only_and_is_the_mean_over_blocks(name):
    model = backbone(name)
    output = model.train()(torch.cat(rows()), context())
    assert output.generative_loss > 0
    torch.testing.assert_close(2 * output.generative_loss, output.maps[0].loss + output.maps[1].loss)
    assert model.eval()(torch.cat(rows()), context()).generative_loss == 0


@pytest.mark.parametrize("name", ["variational-mc", "diffusion-factor"])
def test_earlier_blocks_take_the_mean_map_where_only_the_last_samples(name):
    model = backbone(name, blocks=2, sample_blocks="last").eval() if "diff" in name else backbone(name).eval()
    first, second = (model(torch.cat(rows()), context(step=step)) for step in (0, 1))
    layout = context().layout
    early, last = ([attention_map(output.maps[block], layout) for output in (first, second)] for block in (0, 1))
    assert torch.equal(*early)
    assert not torch.equal(*last)


def test_condition_last_gives_every_row_the_last_state():
    """Shown by what `prefix` forbids: the last item reaches earlier rows, and the KL of all rows is one row's."""
    model = backbone("variational-factor", inference="mean", condition="last").eval()
    x, one = torch.cat(rows((4,))), context((4,))
    before = model(x, one)
    after = model(torch.cat((x[:3], -x[3:])), one)
    assert (after.states_ND - before.states_ND)[1:3].abs().min() > 0
    states_ND = model.encoder(model.norm(x + model.position.weight[:4]), one.layout)
    last = model.blocks[0].attention.latent(states_ND[3:]).kl_Z()
    torch.testing.assert_close(before.maps[0].statistics["kl_Z"], 4 * last)
