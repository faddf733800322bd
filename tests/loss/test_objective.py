"""A configuration's loss is another one's where mathematics says so, whatever way its negatives are held."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_data import run_config
from torch import Tensor

import genatt_dist.loss.objective as objective
from data_pipeline.errors import GenattError
from genatt_dist.data.batches import Batch, TrainingBatches
from genatt_dist.data.sequences import Sequences
from genatt_dist.loss.full import full_nll
from genatt_dist.loss.objective import Candidates, Candidature, candidate_nll, trained
from genatt_dist.model.context import identity
from genatt_dist.training.step import DenseModel, Scale, training_noise

STEP, WIDTH, DEVICE = 3, 16, torch.device("cpu")


def drawn(path: Path, loss: dict[str, Any], targets: str = "all") -> tuple[Batch, Candidates, Tensor, Tensor]:
    """A batch, its candidates, the rows of the whole table, and states at the trained positions."""
    config = run_config(path, loss=loss, data={"targets": targets})
    sequences = Sequences.read(config.data.path)
    batch = next(iter(TrainingBatches.plan(sequences, config.data, config.training).iterate(0, 0, 0, 1, DEVICE)))
    popularity = torch.from_numpy(sequences.popularity[1:])
    candidature = Candidature(config.loss, sequences.num_items, popularity, DEVICE)
    noise = training_noise(batch, config.training.seed, STEP, config)
    draw = torch.Generator().manual_seed(0)
    table = torch.randn(sequences.num_items + 1, WIDTH, generator=draw)
    states = torch.randn(len(batch.layout.row_N), WIDTH, generator=draw)
    return batch, candidature.draw(batch, noise, config.training.seed, STEP), table, trained(batch, states)


def nll(batch: Batch, candidates: Candidates, table: Tensor, states: Tensor) -> Tensor:
    return candidate_nll(states, table[candidates.ids], batch, candidates)


@pytest.mark.parametrize("targets", ["all", "last"])
def test_gbce_of_one_negative_without_calibration_is_bce(targets: str, prepared: Path) -> None:
    gbce = drawn(prepared, {"kind": "gbce", "num_negatives": 1, "calibration": 0.0}, targets)
    bce = drawn(prepared, {"kind": "bce"}, targets)
    assert torch.equal(nll(*gbce), nll(*bce))
    calibrated = drawn(prepared, {"kind": "gbce", "num_negatives": 1, "calibration": 1.0}, targets)
    assert (nll(*calibrated) < nll(*bce)).all()


@pytest.mark.parametrize("loss", [{"kind": "sampled", "proposal": "popularity"}, {"kind": "gbce", "shared": True}])
def test_own_negatives_are_the_shared_ones_where_they_are_the_same(loss: dict[str, Any], prepared: Path) -> None:
    batch, shared, table, states = drawn(prepared, loss | {"num_negatives": 12})
    assert shared.index_TK is None
    assert shared.negatives is not None
    assert shared.negatives.shape == (12,)
    every_T1 = torch.zeros(len(states), 1, dtype=torch.int64)
    expected = shared.log_expected
    own = replace(
        shared,
        negatives=shared.negatives + every_T1,
        index_TK=torch.arange(12) + every_T1,
        log_expected=None if expected is None else expected + every_T1,
    )
    torch.testing.assert_close(nll(batch, own, table, states), nll(batch, shared, table, states))


@pytest.mark.parametrize(
    "loss", [{"kind": "sampled", "shared": False, "proposal": "log_uniform"}, {"kind": "gbce", "num_negatives": 7}]
)
def test_own_negatives_are_looked_up_once_and_belong_to_their_token(loss: dict[str, Any], prepared: Path) -> None:
    batch, own, *_ = drawn(prepared, loss | {"num_negatives": 7}, "last")
    assert own.negatives is not None
    assert own.index_TK is not None
    ids_U = own.ids[len(batch.items_M) :]
    assert torch.equal(ids_U[own.index_TK], own.negatives)
    assert len(ids_U.unique()) == len(ids_U)
    everywhere, in_all, *_ = drawn(prepared, loss | {"num_negatives": 7}, "all")
    assert in_all.negatives is not None
    assert batch.chosen is not None
    assert torch.equal(everywhere.window_B, batch.window_B)
    assert torch.equal(own.negatives, in_all.negatives[batch.chosen])


def test_uncorrected_in_batch_negatives_are_a_softmax_over_the_targets(prepared: Path) -> None:
    batch, candidates, table, states = drawn(prepared, {"kind": "sampled", "proposal": "in_batch", "logq": False})
    scores_TT = states @ table[batch.targets_N].T
    other_TT = batch.targets_N[:, None] != batch.targets_N
    own_T = scores_TT.diagonal()
    expected = torch.log(own_T.exp() + (scores_TT.exp() * other_TT).sum(1)) - own_T
    torch.testing.assert_close(nll(batch, candidates, table, states), expected)


def test_many_uniform_negatives_approach_the_full_softmax(prepared: Path) -> None:
    """Each item is expected a hundred times in 4,000 draws, so that its share of the sum is known within a tenth."""
    loss = {"kind": "sampled", "num_negatives": 4000, "shared": False}
    batch, candidates, table, states = drawn(prepared, loss)
    states = 0.3 * states
    expected = full_nll(states, table, batch.targets_N, 8, 1)
    found = nll(batch, candidates, table, states)
    # The target, certain, is counted beside the draws of the others: both estimate the same denominator.
    assert (found - expected).abs().max() < 0.2
    assert abs((found - expected).mean()) < 0.02


def test_chunks_of_targets_do_not_matter(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for size in (1 << 26, 4 * 16 * 3):
        monkeypatch.setitem(objective.SCORES_BYTES, "cpu", size)
        batch, candidates, table, states = drawn(prepared, {"kind": "sampled", "num_negatives": 16})
        table.requires_grad_(), states.requires_grad_()
        total = nll(batch, candidates, table, states).square().sum()
        results.append((total.detach(), *torch.autograd.grad(total, (table, states))))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


OWN = {"kind": "sampled", "shared": False}
LOSSES = [{"kind": "full"}, {"kind": "sampled"}, OWN, {"kind": "bce"}, {"kind": "gbce"}]


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: "-".join(map(str, loss.values())))
def test_temperature_divides_the_scores(loss: dict[str, Any], prepared: Path) -> None:
    """A table of rows halved at τ = ½ has the same scores, if what goes into the model stays."""
    values = []
    for temperature, factor in ((0.5, 0.5), (1.0, 1.0)):
        config = run_config(prepared, loss=loss | {"temperature": temperature, "num_negatives": 8})
        batch, candidates, *_ = drawn(prepared, loss | {"num_negatives": 8})
        torch.manual_seed(0)
        model = DenseModel(config, 40).eval()
        states = torch.randn(len(batch.layout.row_N), WIDTH, generator=torch.Generator().manual_seed(1))
        model.backbone.forward = lambda *_, states=states: Output(states)  # type: ignore
        assert model.items is not None
        with torch.no_grad():
            model.items.weight.normal_(generator=torch.Generator().manual_seed(2)).mul_(factor)
            noise = training_noise(batch, 0, STEP, config)
            scale = Scale(batch.num_tokens, batch.num_targets)
            values.append(model(batch, candidates, noise, None, scale, identity).recommendation)
    torch.testing.assert_close(*values)


class Output:
    """What the backbone gives."""

    def __init__(self, states: Tensor) -> None:
        self.states_ND, self.generative_loss = states, torch.zeros(())


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        ({"kind": "sampled", "proposal": "in_batch", "shared": False}, "use shared=true, or proposal=popularity"),
        ({"kind": "gbce", "proposal": "popularity"}, "its calibration assumes uniform negatives"),
        ({"kind": "bce", "proposal": "popularity"}, "proposal=popularity with kind=bce: only kind=sampled reads it"),
        ({"kind": "full", "shared": False}, "shared=False with kind=full: only kind=sampled and gbce reads it"),
        ({"kind": "sampled", "calibration": 0.5}, "drop loss.calibration, or set loss.kind=gbce"),
        ({"temperature": 0}, "loss.temperature=0: input should be greater than 0"),
    ],
)
def test_a_loss_that_cannot_be_is_refused(loss: dict[str, Any], message: str, prepared: Path) -> None:
    with pytest.raises(GenattError, match=message):
        run_config(prepared, loss=loss)
