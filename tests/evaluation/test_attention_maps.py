"""The maps that an evaluation keeps are those of the model, of users that every run on the data shares."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_data import histories, numbered

from genatt_dist.attention.attend import attention_map
from genatt_dist.attention.options import (
    DiffusionAttention,
    HybridAttention,
    RecurrentAttention,
    VariationalAttention,
)
from genatt_dist.data.histories import Histories
from genatt_dist.evaluation import maps
from genatt_dist.evaluation.evaluate import sampling_context
from genatt_dist.evaluation.maps import LONG, SAMPLES, UNIT, USERS, choose, write_maps
from genatt_dist.evaluation.run import evaluate_run
from genatt_dist.model.backbone import Backbone
from genatt_dist.serving.trained import Trained, load


@pytest.fixture
def trained(trained_run: Path) -> Trained:
    return load(trained_run)


def with_attention(trained: Trained, attention: object, **changes: object) -> Trained:
    """The same table and data under fresh weights of another attention."""
    model = trained.config.model.model_copy(update={"attention": attention, **changes})
    torch.manual_seed(0)
    backbone = Backbone(model, trained.config.data.max_len).eval()
    return replace(trained, config=trained.config.model_copy(update={"model": model}), backbone=backbone)


def written(trained: Trained, path: Path, split: str = "test") -> dict:
    write_maps(path / "maps.json", trained, split)
    assert [file.name for file in path.iterdir()] == ["maps.json"]
    return json.loads((path / "maps.json").read_text())


def triangle(weights: list[int]) -> np.ndarray:
    size = round((np.sqrt(8 * len(weights) + 1) - 1) / 2)
    square = np.zeros((size, size))
    square[np.tril_indices(size)] = np.array(weights) * UNIT
    return square


def test_users_are_those_with_long_histories_and_the_same_for_every_run() -> None:
    sequences = numbered([3, 40, 12, 2, 25, 30, 18, 60, 11, 9, 90, 14])
    users = choose(sequences, "test", max_len=50)
    assert len(users) == USERS
    assert all(sequences.lengths[users] - 1 >= LONG)
    assert np.array_equal(users, choose(sequences, "test", max_len=200))
    few = choose(numbered([3, 4, 2, 12]), "test", max_len=50)
    assert few.tolist() == [0, 1, 3]  # the third has no target; the others' histories are what there is


def test_the_map_of_a_deterministic_attention_is_the_models(trained: Trained, tmp_path: Path) -> None:
    report = written(trained, tmp_path)
    users = choose(trained.sequences, "test", trained.config.data.max_len)
    assert [entry["user_id"] for entry in report["users"]] == [100 + user_of(trained, user) for user in users]
    lengths = trained.sequences.history_end("test")[users] - trained.sequences.offsets[users]
    items, first = trained.sequences.take(trained.sequences.offsets[users], lengths)
    batch = Histories.of(items, first, first + lengths, users, trained.config.data.max_len, trained.device)
    with torch.no_grad():
        output = trained.backbone(trained.table.lookup(batch.items_N), sampling_context(batch, trained.config))
    a_BHnn = attention_map(output.maps[0], batch.layout)
    for place, (entry, length) in enumerate(zip(report["users"], batch.layout.lengths_B.tolist(), strict=True)):
        (shown,) = entry["maps"]
        assert (shown["samples"], shown["total_variation"]) == ([], None)
        np.testing.assert_allclose(triangle(shown["mean"]), a_BHnn[place, 0, :length, :length], atol=UNIT / 2 + 1e-7)
        everything = histories()[entry["user_id"] - 100]
        assert entry["item_ids"] == everything[-1 - length : -1]
        assert entry["target_id"] == everything[-1]
        assert entry["older"] == 0
        assert entry["titles"] is None


def user_of(trained: Trained, index: int) -> int:
    return trained.sequences.user_ids[int(index)].as_py() - 100


@pytest.mark.parametrize(
    "attention",
    [
        VariationalAttention(rank=4, latent_size=6, generator_size=12),
        DiffusionAttention(rank=4, latent_size=6, generator_size=12, form="matrix", diffusion_steps=4),
        HybridAttention(generator=VariationalAttention(rank=4, latent_size=6, generator_size=12)),
    ],
    ids=lambda attention: attention.type,
)
def test_samples_differ_and_their_mean_is_over_more_than_are_kept(
    attention: object, trained: Trained, tmp_path: Path
) -> None:
    report = written(with_attention(trained, attention, num_blocks=2, num_heads=2), tmp_path)
    assert report["num_samples"] == SAMPLES
    for entry in report["users"]:
        assert [(one["block"], one["head"]) for one in entry["maps"]] == [(0, 0), (0, 1), (1, 0), (1, 1)]
        for one in entry["maps"]:
            samples = [triangle(sample) for sample in one["samples"]]
            assert len(samples) == maps.KEPT
            assert not np.array_equal(samples[0], samples[1])
            for square in (*samples, triangle(one["mean"])):
                np.testing.assert_allclose(square.sum(1), 1, atol=UNIT / 2 * len(square))
            assert 0 < one["total_variation"] < 1
            assert 0 < one["entropy"] <= 1
    assert report == written(with_attention(trained, attention, num_blocks=2, num_heads=2), tmp_path)  # keyed noise


def test_the_entropy_is_that_of_samples_not_of_their_mean(trained: Trained, tmp_path: Path) -> None:
    """Entropy is concave: a mean of maps is at least as even as the maps on average."""
    attention = VariationalAttention(rank=4, latent_size=6, generator_size=12, form="matrix")
    for entry in written(with_attention(trained, attention), tmp_path)["users"]:
        (one,) = entry["maps"]
        rows = triangle(one["mean"])[1:]
        logs = np.log(rows, where=rows > 0, out=np.zeros_like(rows))
        of_mean = (-(rows * logs).sum(1) / np.log(np.arange(2, len(rows) + 2))).mean()
        assert one["entropy"] < of_mean


def test_a_shared_map_is_kept_once_and_a_gru_has_none(trained: Trained, tmp_path: Path) -> None:
    shared = with_attention(trained, VariationalAttention(rank=4), num_blocks=2, share_map=True)
    assert [len(entry["maps"]) for entry in written(shared, tmp_path)["users"]] == [1] * USERS
    gru = with_attention(trained, RecurrentAttention())
    assert [entry["maps"] for entry in written(gru, tmp_path)["users"]] == [[]] * USERS


def test_of_a_long_history_the_newest_items_are_kept(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = written(trained, tmp_path)
    monkeypatch.setattr(maps, "WIDEST", 5)
    for entry, full in zip(written(trained, tmp_path)["users"], whole["users"], strict=True):
        assert entry["older"] == len(full["item_ids"]) - 5
        assert entry["item_ids"] == full["item_ids"][-5:]
        kept, square = triangle(entry["maps"][0]["mean"]), triangle(full["maps"][0]["mean"])
        np.testing.assert_array_equal(kept, square[-5:, -5:])


def test_titles_are_the_vocabularys(trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = maps.shards.read_vocabulary

    def titled(path: str, manifest: object) -> object:
        table = read(path, manifest)
        names = [f"T{item}" for item in table["item_id"].to_pylist()]
        return table.append_column("title", [[None, *names[1:]]])

    monkeypatch.setattr(maps.shards, "read_vocabulary", titled)
    first = read(trained.config.data.path, trained.sequences.manifest)["item_id"][0].as_py()
    for entry in written(trained, tmp_path)["users"]:
        expected = [str(item) if item == first else f"T{item}" for item in entry["item_ids"]]
        assert entry["titles"] == expected


def test_an_evaluation_leaves_the_maps_of_its_split(trained_run: Path) -> None:
    report = evaluate_run(trained_run, "valid")
    kept = json.loads((trained_run / "maps-valid.json").read_text())
    assert (kept["split"], kept["step"]) == ("valid", report["step"])
    for entry in kept["users"]:
        assert entry["target_id"] == histories()[entry["user_id"] - 100][-2]
