"""The dense model's losses are what plain autograd makes of their definitions, also with K samples of the map."""

from pathlib import Path

import pytest
import torch
from tiny_data import run_config
from torch.nn import functional as F

from genatt_dist.attention.noise import NoiseKey, Purpose, derive
from genatt_dist.config import RunConfig
from genatt_dist.data.batches import Batch, TrainingBatches
from genatt_dist.data.sequences import Sequences
from genatt_dist.loss.objective import Candidates, Candidature
from genatt_dist.model.context import Context, identity
from genatt_dist.training.step import DenseModel, Scale, training_noise

STEP, DEVICE = 3, torch.device("cpu")


def case(path: Path, loss: dict, samples: int, targets: str) -> tuple[RunConfig, Sequences, Batch]:
    attention = {"type": "variational", "train_samples": samples, "latent_size": 4, "generator_size": 8, "rank": 4}
    config = run_config(path, loss=loss, model={"attention": attention, "dropout": 0.3}, data={"targets": targets})
    sequences = Sequences.read(config.data.path)
    batches = TrainingBatches.plan(sequences, config.data, config.training)
    return config, sequences, next(iter(batches.iterate(0, 0, 0, 1, DEVICE)))


def reference(model: DenseModel, config: RunConfig, batch: Batch, candidates: Candidates) -> torch.Tensor:
    """Σ over targets of −log mean_k exp(−nll_k), each sample in a pass of its own, divided by the targets."""
    assert model.items is not None
    layout, weight = batch.layout, model.items.weight
    nlls = []
    for sample in range(getattr(model.config.model.attention, "train_samples", 1)):
        seed = derive(config.training.seed, int(Purpose.TRAINING), sample)
        assert isinstance(seed, int)
        noise = NoiseKey.make(seed, STEP, batch.window_B, layout.row_N, layout.position_N)
        states = model.backbone(weight[batch.items_M[batch.input_index_N]], Context.whole(layout, noise)).states_ND
        logits = states @ weight[1:].T
        if config.loss.kind == "sampled":
            assert candidates.negatives is not None
            target = logits.gather(1, batch.targets_N[:, None] - 1)
            drawn = logits[:, candidates.negatives - 1] - candidates.log_expected
            drawn = drawn.masked_fill(candidates.negatives == batch.targets_N[:, None], -torch.inf)
            nlls.append(
                F.cross_entropy(torch.cat((target, drawn), 1), torch.zeros_like(target[:, 0]).long(), reduction="none")
            )
        else:
            nlls.append(F.cross_entropy(logits, batch.targets_N - 1, reduction="none"))
    nll = torch.stack(nlls)
    nll = nll if batch.chosen is None else nll[:, batch.chosen]
    return -(-nll).exp().mean(0).log().sum() / batch.num_targets


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("targets", ["all", "last"])
@pytest.mark.parametrize(
    "loss", [{"kind": "full", "chunk_tokens": 5}, {"kind": "sampled", "num_negatives": 16}], ids=["full", "sampled"]
)
def test_loss_and_gradients_equal_autograd(loss: dict, targets: str, samples: int, prepared: Path) -> None:
    config, sequences, batch = case(prepared, loss, samples, targets)
    torch.manual_seed(0)
    model = DenseModel(config, sequences.num_items).train()
    assert model.items is not None
    torch.nn.init.normal_(model.items.weight.data, std=0.5)
    candidature = Candidature(config.loss, sequences.num_items, torch.from_numpy(sequences.popularity[1:]), DEVICE)
    noise = training_noise(batch, config.training.seed, STEP, config)
    candidates = candidature.draw(batch, noise, config.training.seed, STEP)

    expected = reference(model, config, batch, candidates)
    expected.backward()
    wanted = {
        name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None
    }
    model.zero_grad()
    losses = model(batch, candidates, noise, None, Scale(batch.num_tokens, batch.num_targets), identity)
    losses.recommendation.backward()

    torch.testing.assert_close(losses.recommendation, expected, rtol=1e-5, atol=1e-6)
    assert {"items.weight", "backbone.position.weight"} <= wanted.keys()
    for name, parameter in model.named_parameters():
        if name in wanted:
            torch.testing.assert_close(parameter.grad, wanted[name], rtol=1e-4, atol=1e-6, msg=name)


def test_more_samples_give_a_tighter_bound(prepared: Path) -> None:
    """By Jensen the expected bound falls with K; here on one batch with a wide latent."""
    values = []
    for samples in (1, 8):
        config, sequences, batch = case(prepared, {"kind": "full"}, samples, "all")
        torch.manual_seed(0)
        model = DenseModel(config, sequences.num_items).train()
        assert model.items is not None
        torch.nn.init.normal_(model.items.weight.data, std=0.5)
        scale = Scale(batch.num_tokens, batch.num_targets)
        with torch.no_grad():
            draws = [
                model(
                    batch, Candidates(batch.items_M), training_noise(batch, seed, STEP, config), None, scale, identity
                )
                for seed in range(8)
            ]
        values.append(sum(float(draw.recommendation) for draw in draws) / len(draws))
    assert values[1] < values[0]


def test_candidates_are_one_list_and_the_same_on_every_rank(prepared: Path) -> None:
    """One lookup a step: windows' items first, then the negatives, which depend on seed and step alone."""
    config, sequences, _ = case(prepared, {"kind": "sampled", "num_negatives": 9}, 1, "all")
    popularity = torch.from_numpy(sequences.popularity[1:])
    candidature = Candidature(config.loss, sequences.num_items, popularity, DEVICE)
    batches = TrainingBatches.plan(sequences, config.data, config.training)
    drawn = []
    for rank in range(2):
        part = next(iter(batches.iterate(0, 0, rank, 2, DEVICE)))
        candidates = candidature.draw(part, training_noise(part, 0, STEP, config), 0, STEP)
        assert torch.equal(candidates.ids[: len(part.items_M)], part.items_M)
        assert torch.equal(candidates.ids[len(part.items_M) :], candidates.negatives)
        drawn.append(candidates.negatives)
    assert torch.equal(*drawn)
