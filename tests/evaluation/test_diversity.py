"""Metrics of lists equal plain loops over sets, however users are divided; categories come from the right column."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from category_data import GENRES, add_attributes, add_genres, diversity_by_loops
from tiny_data import NUM_ITEMS

from data_pipeline.errors import GenattError
from genatt_dist.data.sequences import Sequences
from genatt_dist.evaluation.categories import Categories, categories_of, need_categories
from genatt_dist.evaluation.diversity import Lists, gini
from genatt_dist.evaluation.metrics import CUTOFFS, DEFINITIONS

CPU = torch.device("cpu")
U, V, K = 300, 60, 1000
ACCURACY = {f"{name}@{k}": 0.01 * k for name in ("recall", "ndcg") for k in CUTOFFS}


def made() -> tuple[torch.Tensor, np.ndarray, Categories, dict[int, set[str]]]:
    """Lists of users, some of them short, popularity with zeros, and up to nine of K categories an item, often none."""
    draw = np.random.default_rng(1)
    top = np.stack([1 + draw.permutation(V)[: max(CUTOFFS)] for _ in range(U)])
    for user in range(0, U, 9):
        top[user, draw.integers(0, 20) :] = 0
    names = [str(number) for number in range(K)]
    lists = [sorted(draw.choice(K, draw.integers(0, 10), replace=False).tolist()) for _ in range(V)]
    number = torch.tensor([0, *map(len, lists)])
    category = torch.tensor([one for items in lists for one in items], dtype=torch.int32)
    categories = Categories("made", names, torch.cat((torch.zeros(1, dtype=torch.int64), number.cumsum(0))), category)
    popularity = np.concatenate(([0], draw.integers(0, 30, V)))
    return torch.from_numpy(top), popularity, categories, {i: {names[c] for c in x} for i, x in enumerate(lists, 1)}


def test_equals_plain_loops() -> None:
    top, popularity, categories, sets = made()
    lists = Lists(popularity, categories, CPU)
    lists.add(top)
    found = lists.metrics(ACCURACY, lists.shown(), torch.Tensor.clone)
    items = [[item for item in row if item] for row in top.tolist()]
    expected = diversity_by_loops(items, popularity.tolist(), ACCURACY, sets, K)
    assert found == pytest.approx(expected, abs=1e-9)
    assert {name.split("@")[0] for name in found} <= DEFINITIONS.keys()


@pytest.mark.parametrize("batch", [1, 7, 128])
def test_batches_and_ranks_add_up_to_the_same_numbers(batch: int) -> None:
    """Not nearly: exactly, because only whole numbers are added."""
    top, popularity, categories, _ = made()
    whole = Lists(popularity, categories, CPU)
    whole.add(top)
    parts = [Lists(popularity, categories, CPU) for _ in range(3)]
    for number, users in enumerate(top.split(batch)):
        parts[number % 3].add(users)
    shown = sum(part.shown() for part in parts)
    assert np.array_equal(shown, whole.shown())
    distances = sum(part._distance_X2 for part in parts)
    found = parts[0].metrics(ACCURACY, shown, lambda _: distances)
    assert found == whole.metrics(ACCURACY, whole.shown(), torch.Tensor.clone)


def test_gini_is_0_for_equal_shares_and_greatest_for_one_item() -> None:
    assert gini(np.full(10, 7)) == 0
    assert gini(np.array([0, 0, 0, 5])) == pytest.approx(3 / 4)
    assert gini(np.zeros(4, int)) == 0


@pytest.fixture
def data(prepared: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(prepared, tmp_path / "data"))


def read(path: Path, column: str | None = None) -> Categories | None:
    return categories_of(Sequences.read(str(path)), column, CPU)


def test_the_only_column_of_lists_of_text_is_taken(data: Path) -> None:
    sets = add_genres(data, NUM_ITEMS)
    found = read(data)
    assert found is not None
    assert (found.column, found.names) == ("genres", list(GENRES))
    index, category = found.of(torch.arange(NUM_ITEMS + 1))
    pairs = {(item, found.names[number]) for item, number in zip(index.tolist(), category.tolist(), strict=True)}
    assert pairs == {(item, name) for item, names in sets.items() for name in names}
    ids = torch.tensor([3, 7, 3, 0, NUM_ITEMS])
    index, category = found.of(ids)
    for place, item in enumerate(ids.tolist()):
        assert {found.names[number] for number in category[index == place].tolist()} == sets.get(item, set())


def test_text_that_repeats_is_taken_where_there_are_no_lists(data: Path) -> None:
    assert read(data) is None
    add_attributes(data, title=[f"t{item}" for item in range(NUM_ITEMS)], kind=["a", "b", None, ""] * (NUM_ITEMS // 4))
    found = read(data)
    assert found is not None
    assert (found.column, found.names, len(found.category_E)) == ("kind", ["a", "b"], NUM_ITEMS // 2)
    add_attributes(data, other=["x", "y"] * (NUM_ITEMS // 2))
    assert read(data) is None  # which of the two?
    chosen = read(data, "other")
    assert chosen is not None
    assert chosen.names == ["x", "y"]


def test_columns_that_cannot_be_taken_are_one_line(data: Path) -> None:
    with pytest.raises(GenattError, match=r"category_column=genres is not in the vocabulary of .*: it has no attrib"):
        read(data, "genres")
    with pytest.raises(GenattError, match="has no column that is plainly categories"):
        need_categories(Sequences.read(str(data)), None, CPU)
    add_attributes(data, price=[0.5] * NUM_ITEMS, year=list(range(NUM_ITEMS)))
    with pytest.raises(GenattError, match=r"category_column=genres is not in the vocabulary of .*: it has price, year"):
        read(data, "genres")
    with pytest.raises(GenattError, match=r"category_column=price of .* holds double"):
        read(data, "price")
    years = read(data, "year")
    assert years is not None
    assert len(years.names) == NUM_ITEMS


def test_an_unknown_category_is_told_the_nearest(data: Path) -> None:
    add_genres(data, NUM_ITEMS)
    found = read(data)
    assert found is not None
    with pytest.raises(GenattError, match="'Comdy' is not among the 5 of column genres: did you mean 'Comedy'"):
        found.index("Comdy")
    with pytest.raises(GenattError, match="use Comedy, Drama"):
        found.index("zzz")


def test_groups_may_have_items_of_any_of_their_categories(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sets = add_genres(data, NUM_ITEMS)
    found = read(data)
    assert found is not None
    groups = [["Drama"], [], ["War", "Western"], ["Comedy", "Drama"]]
    ids = torch.arange(1, NUM_ITEMS + 1)
    expected = [[not names or bool(sets[item] & set(names)) for item in ids.tolist()] for names in groups]
    for block in (1, 1 << 24):
        monkeypatch.setattr("genatt_dist.evaluation.categories._BLOCK", block)
        assert found.filter(groups, torch.zeros(1, dtype=torch.int64)).allowed(ids).tolist() == expected
