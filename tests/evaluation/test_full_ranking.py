"""Evaluation of a model, and of popularity, equals scoring every user by hand and sorting."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from category_data import add_genres, diversity_by_loops
from tiny_data import NUM_ITEMS, run_config

from data_pipeline.errors import GenattError
from genatt_dist.config import RunConfig
from genatt_dist.data.sequences import Sequences
from genatt_dist.evaluation.evaluate import Parts, Result, evaluate
from genatt_dist.evaluation.metrics import CUTOFFS, metrics
from genatt_dist.evaluation.popularity import evaluate_popularity
from genatt_dist.model.context import Context
from genatt_dist.model.jagged import Jagged
from genatt_dist.training.step import DenseModel

CPU = torch.device("cpu")
every_split = pytest.mark.parametrize("split", ["valid", "test"])


@pytest.fixture(scope="module")
def sequences(prepared: Path) -> Sequences:
    return Sequences.read(str(prepared))


@pytest.fixture(scope="module")
def model(prepared: Path, sequences: Sequences) -> DenseModel:
    """Fresh weights, larger than usual: states and scores differ widely between users."""
    torch.manual_seed(0)
    model = DenseModel(run_config(prepared), sequences.num_items).eval()
    assert model.items is not None
    torch.nn.init.normal_(model.items.weight.data)
    return model


def ranked(model: DenseModel, sequences: Sequences, split: str, config: RunConfig, **more: object) -> Result:
    assert model.items is not None
    return evaluate(model.backbone, model.items, sequences, split, config, CPU, **more)  # type: ignore[arg-type]


def history_of(sequences: Sequences, user: int) -> np.ndarray:
    return sequences.take(sequences.offsets[[user]], sequences.lengths[[user]])[0]


def brute_force(
    scores_UV: np.ndarray,
    sequences: Sequences,
    split: str,
    exclude_seen: bool,
    sets: dict[int, set[str]] | None = None,
    only: set[str] | None = None,
) -> Result:
    """Ranks and metrics from all scores [U, V] by loops."""
    ranks, users, lists, shown = [], [], [], np.zeros((len(CUTOFFS), sequences.num_items), int)
    for user in np.flatnonzero(sequences.has_target(split)):
        history = history_of(sequences, user).tolist()
        held_out = {"valid": 2, "test": 1}[split]
        target, known = history[-held_out], history[:-held_out]
        if only and sets and not sets[target] & only:
            continue
        scores = {item: float(scores_UV[user, item - 1]) for item in range(1, sequences.num_items + 1)}
        for item in known if exclude_seen else []:
            scores[item] = -np.inf
        for item in scores if only and sets else []:
            scores[item] = scores[item] if sets[item] & only else -np.inf
        order = sorted(scores, key=lambda item: (-scores[item], item))
        ranks.append(order.index(target) + 1)
        users.append(user)
        lists.append([item for item in order[: max(CUTOFFS)] if scores[item] > -np.inf])
        for index, k in enumerate(CUTOFFS):
            shown[index, np.array(lists[-1][:k], int) - 1] += 1
    accuracy = metrics(np.array(ranks), shown)
    diversity = diversity_by_loops(lists, sequences.popularity.tolist(), accuracy, sets)
    return Result(accuracy | diversity, np.array(ranks), np.array(users))


def scores_by_hand(model: DenseModel, sequences: Sequences, split: str, max_len: int) -> np.ndarray:
    """Each user alone through the backbone, then against all rows."""
    assert model.items is not None
    weight = model.items.weight.detach()
    scores = np.zeros((sequences.num_users, sequences.num_items))
    for user in np.flatnonzero(sequences.has_target(split)):
        history = history_of(sequences, user).tolist()
        history = history[: -{"valid": 2, "test": 1}[split]][-max_len:]
        layout = Jagged.of(torch.tensor([len(history)]), len(history), len(history))
        with torch.no_grad():
            states = model.backbone(weight[history], Context.whole(layout)).states_ND
        scores[user] = states[-1].double().numpy() @ weight[1:].double().numpy().T
    return scores


@every_split
@pytest.mark.parametrize("exclude_seen", [True, False])
def test_evaluation_equals_scoring_each_user_by_hand(
    split: str, exclude_seen: bool, model: DenseModel, sequences: Sequences, prepared: Path
) -> None:
    config = run_config(prepared, evaluation={"exclude_seen": exclude_seen})
    found = ranked(model, sequences, split, config)
    expected = brute_force(scores_by_hand(model, sequences, split, 8), sequences, split, exclude_seen)
    assert found.rank_U.tolist() == expected.rank_U.tolist()
    assert found.metrics == pytest.approx(expected.metrics)
    assert len(set(found.rank_U.tolist())) > 5


@every_split
@pytest.mark.parametrize("exclude_seen", [True, False])
def test_the_id_that_rare_items_share_is_in_no_list(
    split: str, exclude_seen: bool, model: DenseModel, sequences: Sequences, prepared: Path
) -> None:
    shared = 3
    ends = sequences.history_end("valid"), sequences.history_end("test")
    valid, test = (
        np.where(sequences.take(np.minimum(end, sequences.offsets[1:] - 1), np.ones_like(end))[0] == shared, -1, places)
        for end, places in zip(ends, (sequences.valid, sequences.test), strict=True)
    )
    manifest = sequences.manifest.model_copy(update={"out_of_vocabulary": shared})
    rare = replace(sequences, manifest=manifest, valid=valid.astype(np.int32), test=test.astype(np.int32))
    config = run_config(prepared, evaluation={"exclude_seen": exclude_seen})
    scores = scores_by_hand(model, rare, split, 8)
    with_it = brute_force(scores, rare, split, exclude_seen)
    scores[:, shared - 1] = -np.inf
    expected = brute_force(scores, rare, split, exclude_seen)
    assert with_it.rank_U.tolist() != expected.rank_U.tolist()
    found = ranked(model, rare, split, config)
    assert found.rank_U.tolist() == expected.rank_U.tolist()
    assert found.metrics == pytest.approx(expected.metrics)


@pytest.mark.parametrize("batch_users", [1, 7, 512])
@pytest.mark.parametrize("chunk_items", [3, 65_536])
def test_batches_and_chunks_change_nothing(
    batch_users: int, chunk_items: int, model: DenseModel, sequences: Sequences, prepared: Path
) -> None:
    cut = run_config(prepared, evaluation={"batch_users": batch_users, "chunk_items": chunk_items})
    found, expected = ranked(model, sequences, "test", cut), ranked(model, sequences, "test", run_config(prepared))
    assert found.rank_U.tolist() == expected.rank_U.tolist()
    assert found.metrics == expected.metrics


@pytest.fixture(scope="module")
def labelled(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Sequences, dict[int, set[str]]]:
    """The same data with genres in the vocabulary, and those of each item."""
    path = Path(shutil.copytree(prepared, tmp_path_factory.mktemp("labelled") / "tiny"))
    sets = add_genres(path, NUM_ITEMS)
    return Sequences.read(str(path)), sets


@every_split
def test_metrics_of_categories_equal_loops(
    split: str, model: DenseModel, labelled: tuple[Sequences, dict[int, set[str]]], prepared: Path
) -> None:
    sequences, sets = labelled
    found = ranked(model, sequences, split, run_config(prepared))
    expected = brute_force(scores_by_hand(model, sequences, split, 8), sequences, split, True, sets)
    assert {"cc@10", "f@10", "ild@10"} <= found.metrics.keys()
    assert found.metrics == pytest.approx(expected.metrics, abs=1e-9)
    popular = evaluate_popularity(sequences, split, run_config(prepared)).metrics
    assert popular.keys() == found.metrics.keys()


@pytest.mark.parametrize("only", [("Drama",), ("War", "Sci-Fi/Space")])
def test_categories_alone_are_ranked_for_those_whose_target_is_one(
    only: tuple[str, ...], model: DenseModel, labelled: tuple[Sequences, dict[int, set[str]]], prepared: Path
) -> None:
    sequences, sets = labelled
    found = ranked(model, sequences, "test", run_config(prepared), only=only)
    scores = scores_by_hand(model, sequences, "test", 8)
    expected = brute_force(scores, sequences, "test", True, sets, set(only))
    assert 0 < len(found.rank_U) < sequences.has_target("test").sum()
    assert found.user_U.tolist() == expected.user_U.tolist()
    assert found.rank_U.tolist() == expected.rank_U.tolist()
    assert found.metrics == pytest.approx(expected.metrics, abs=1e-9)


def test_categories_that_no_target_has_are_refused(
    model: DenseModel, labelled: tuple[Sequences, dict[int, set[str]]], sequences: Sequences, prepared: Path
) -> None:
    of_nobody = replace(labelled[0], test=np.where(np.arange(labelled[0].num_users) == 5, 1, -1).astype(np.int32))
    target = int(history_of(of_nobody, 5)[1])
    absent = next(name for name in ("War", "Drama", "Comedy", "Western") if name not in labelled[1][target])
    with pytest.raises(GenattError, match=f"no user has a test item of {absent} to be ranked: choose other"):
        ranked(model, of_nobody, "test", run_config(prepared), only=[absent])
    with pytest.raises(GenattError, match="has no column that is plainly categories"):
        ranked(model, sequences, "test", run_config(prepared), only=["War"])


def test_parts_of_a_split_add_up_to_the_whole(
    model: DenseModel, labelled: tuple[Sequences, dict[int, set[str]]], prepared: Path
) -> None:
    """What every rank counts is summed: here the parts are run in turn and their sums put in afterwards."""
    sequences, _ = labelled
    config = run_config(prepared)
    sums: dict[int, torch.Tensor] = {}

    def collect(rank: int, totals: dict[int, torch.Tensor] | None):
        order = iter(range(10))

        def total(value: torch.Tensor) -> torch.Tensor:
            place = next(order)
            if totals is not None:
                return totals[place]
            sums[place] = sums.get(place, torch.zeros_like(value)) + value
            return value

        return Parts(rank, 3, total)

    for rank in range(3):
        ranked(model, sequences, "valid", config, parts=collect(rank, None))
    found = ranked(model, sequences, "valid", config, parts=collect(1, sums))
    expected = ranked(model, sequences, "valid", config)
    assert found.rank_U.tolist() == expected.rank_U.tolist()
    assert found.metrics == expected.metrics


def test_progress_counts_every_user_once(model: DenseModel, sequences: Sequences, prepared: Path) -> None:
    told: list[int] = []
    found = ranked(model, sequences, "valid", run_config(prepared), progress=told.append)
    assert sum(told) == len(found.rank_U) == int(sequences.has_target("valid").sum())


@every_split
@pytest.mark.parametrize("batch_users", [5, 512])
def test_popularity_equals_counting_the_training_part(
    split: str, batch_users: int, sequences: Sequences, prepared: Path
) -> None:
    counts = np.zeros(sequences.num_items)
    for user in range(sequences.num_users):
        history = history_of(sequences, user)
        np.add.at(counts, history[: len(history) - 2 if len(history) >= 3 else None] - 1, 1)
    # Equal counts are ordered by chance: dense ids follow all counts, held-out ones too, and would leak them.
    scores = counts * sequences.num_items - np.random.default_rng(0).permutation(sequences.num_items)
    everybody = np.broadcast_to(scores, (sequences.num_users, sequences.num_items))
    found = evaluate_popularity(sequences, split, run_config(prepared, evaluation={"batch_users": batch_users}))
    expected = brute_force(everybody, sequences, split, exclude_seen=True)
    assert found.rank_U.tolist() == expected.rank_U.tolist()
    assert found.metrics == pytest.approx(expected.metrics)
