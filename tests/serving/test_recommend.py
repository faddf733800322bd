"""Lists of items for known users and for raw histories: the best unseen ones, and a word about what was skipped."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from category_data import GENRES, add_genres
from tiny_data import NUM_ITEMS, histories, run_config

from data_pipeline.errors import GenattError
from genatt_dist.data.sequences import Sequences
from genatt_dist.model.context import Context
from genatt_dist.model.jagged import Jagged
from genatt_dist.serving.recommend import read_requests, recommend, write
from genatt_dist.serving.trained import Trained
from genatt_dist.training.step import DenseModel

CPU = torch.device("cpu")
LISTS = histories()
Save = Callable[..., Path]


def make(path: Path, **sections: dict) -> Trained:
    """A model with fresh weights, as if read from a checkpoint."""
    config = run_config(path, **sections)
    sequences = Sequences.read(str(path))
    torch.manual_seed(0)
    model = DenseModel(config, sequences.num_items).eval()
    assert model.items is not None
    torch.nn.init.normal_(model.items.weight.data)
    return Trained(config, model.backbone, model.items, sequences, CPU, 0)


@pytest.fixture(scope="module")
def trained(prepared: Path) -> Trained:
    return make(prepared)


@pytest.fixture(scope="module")
def trained_text(prepared_text: Path) -> Trained:
    return make(prepared_text)


@pytest.fixture
def save(tmp_path: Path) -> Save:
    """Writes columns to a file, kind by its ending."""

    def write(name: str, **columns: list) -> Path:
        frame = pl.DataFrame(columns)
        path = tmp_path / name
        frame.write_parquet(path) if name.endswith("parquet") else frame.write_csv(path)
        return path

    return write


def lists_of(table: pl.DataFrame) -> dict:
    """user → items in the order of their rank."""
    assert table.columns == ["user_id", "rank", "item_id", "score"]
    grouped = table.sort("rank").group_by("user_id", maintain_order=True)
    return {user: part["item_id"].to_list() for (user,), part in grouped}


def log_of(users: list[int]) -> dict[str, list]:
    """The interactions of users of the tiny data set, as rows of a log."""
    pairs = [(100 + user, item) for user in users for item in LISTS[user]]
    return {"user_id": [user for user, _ in pairs], "item_id": [item for _, item in pairs]}


@pytest.mark.parametrize("name", ["users.csv", "users.parquet"])
def test_known_users_get_k_unseen_items_in_falling_order(name: str, trained: Trained, save: Save) -> None:
    users = [105, 103, 120]
    requests = read_requests(save(name, user_id=users), trained)
    assert requests.notes == []
    table = recommend(trained, requests, 7)
    assert list(lists_of(table)) == users  # in the order of the file
    for user, items in lists_of(table).items():
        assert len(set(items)) == 7
        assert not set(items) & set(LISTS[user - 100])
    for _, part in table.group_by("user_id"):
        assert part["rank"].to_list() == [1, 2, 3, 4, 5, 6, 7]
        assert part["score"].is_sorted(descending=True)


@pytest.mark.parametrize("name", ["users.csv", "users.parquet"])
def test_text_ids_are_found_and_given_back_as_text(name: str, trained_text: Trained, save: Save) -> None:
    table = recommend(trained_text, read_requests(save(name, user_id=["u05", "u20"]), trained_text), 4)
    assert set(lists_of(table)) == {"u05", "u20"}
    assert table["item_id"].str.len_chars().unique().to_list() == [5]


def test_text_ids_of_digits_keep_their_zeros_in_csv(trained_text: Trained, save: Save) -> None:
    """00010 is an item, 10 is none: a reader that guesses types would lose the user's whole history."""
    history = [f"{item:05d}" for item in LISTS[20]]
    path = save("histories.csv", user_id=["007"] * len(history), item_id=history)
    requests = read_requests(path, trained_text)
    assert requests.notes == []
    table = recommend(trained_text, requests, 3)
    assert set(table["user_id"]) == {"007"}


def test_equals_scoring_the_catalogue_by_hand(trained: Trained, save: Save) -> None:
    """Of the whole history, held-out items too: they are the past now."""
    found = lists_of(recommend(trained, read_requests(save("u.csv", user_id=[120]), trained), 9))[120]
    words = {word: dense for dense, word in dense_words(trained).items()}
    history = [words[item] for item in LISTS[20]]
    shown = history[-8:]
    layout = Jagged.of(torch.tensor([len(shown)]), len(shown), len(shown))
    weight = trained.table.weight.detach()
    with torch.no_grad():
        state = trained.backbone(weight[shown], Context.whole(layout)).states_ND[-1]
    scores = weight[1:].numpy() @ state.numpy()
    scores[np.array(history) - 1] = -np.inf
    assert found == [dense_words(trained)[int(index) + 1] for index in np.argsort(-scores)[:9]]


def dense_words(trained: Trained) -> dict[int, int]:
    from data_pipeline.format import read_vocabulary

    rows = read_vocabulary(trained.config.data.path, trained.sequences.manifest).to_pylist()
    return {row["dense_id"]: row["item_id"] for row in rows}


def test_a_history_equal_to_a_known_users_gets_the_same_list(trained: Trained, save: Save) -> None:
    known = recommend(trained, read_requests(save("u.csv", user_id=[110, 120]), trained), 5)
    unknown = recommend(trained, read_requests(save("h.csv", **log_of([20, 10])), trained), 5)
    assert lists_of(unknown) == lists_of(known)


def test_the_time_column_orders_a_history(trained: Trained, save: Save) -> None:
    log = log_of([20])
    times = list(range(len(log["user_id"])))
    inorder = recommend(trained, read_requests(save("a.csv", **log), trained), 5)
    reverse = {name: column[::-1] for name, column in (log | {"timestamp": times}).items()}
    assert recommend(trained, read_requests(save("b.csv", **reverse), trained), 5).equals(inorder)
    del reverse["timestamp"]  # then the row order is the time
    assert not recommend(trained, read_requests(save("c.csv", **reverse), trained), 5).equals(inorder)


def test_a_list_does_not_depend_on_who_else_asks(prepared: Path, save: Save) -> None:
    """Also where maps are drawn: a known user's noise hangs on the user."""
    drawn = make(prepared, model={"attention": {"type": "variational", "inference": "sample"}})
    alone = recommend(drawn, read_requests(save("one.csv", user_id=[120]), drawn), 5)
    among = recommend(drawn, read_requests(save("many.csv", user_id=[103, 115, 120, 107]), drawn), 5)
    among = among.filter(pl.col("user_id") == 120)
    assert among["item_id"].to_list() == alone["item_id"].to_list()
    np.testing.assert_allclose(among["score"], alone["score"], rtol=1e-4)


def test_many_batches_give_one_table(trained: Trained, save: Save) -> None:
    users = [100 + index for index in range(48)]
    told: list[int] = []
    table = recommend(trained, read_requests(save("u.csv", user_id=users), trained), 3, told.append)
    assert told == [32, 16]
    assert table.filter(pl.col("user_id") != 147)["user_id"].n_unique() == 47


def test_somebody_who_has_seen_everything_gets_nothing(trained: Trained, save: Save) -> None:
    table = recommend(trained, read_requests(save("u.csv", user_id=[147, 105]), trained), 40)
    assert 147 not in lists_of(table)
    assert len(lists_of(table)[105]) == 40 - len(set(LISTS[5]))


def test_seen_items_may_come_back_where_evaluation_allows_them(prepared: Path, save: Save) -> None:
    lenient = make(prepared, evaluation={"exclude_seen": False})
    table = recommend(lenient, read_requests(save("u.csv", user_id=[147]), lenient), 40)
    assert set(lists_of(table)[147]) == set(LISTS[47])


def test_unknown_users_are_named_and_skipped(trained: Trained, save: Save) -> None:
    requests = read_requests(save("u.csv", user_id=[105, 999, 105, 998]), trained)
    assert requests.user_ids.to_list() == [105]
    (note,) = requests.notes
    assert "skipped 2 users that are not in tiny" in note
    assert "999, 998" in note


def test_unknown_items_are_named_and_skipped(trained: Trained, save: Save) -> None:
    log = log_of([20])
    strange = {"user_id": [*log["user_id"], 120, 7, 9, 8], "item_id": [*log["item_id"], 5555, 6666, 6666, 6666]}
    requests = read_requests(save("h.csv", **strange), trained)
    assert requests.user_ids.to_list() == [120]
    assert requests.notes == [
        "skipped 2 items that are not in the vocabulary: 5555, 6666",
        "skipped 3 users that have no known item: 7, 9, 8",
    ]
    plain = recommend(trained, read_requests(save("p.csv", **log), trained), 5)
    assert recommend(trained, requests, 5).equals(plain)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"user_id": [998, 999]}, r"none of its 2 users is in tiny; give histories: add an item column"),
        ({"user_id": [1], "item_id": [5555]}, r"none of its items is in the vocabulary of tiny"),
        ({"uid": [105]}, r"has no column user_id: it has uid; rename"),
        ({"user_id": ["bob"]}, r"column user_id holds String that is no Int64"),
        ({"user_id": [1], "item_id": ["lamp"]}, r"column item_id holds String that is no Int64"),
    ],
)
def test_a_file_nobody_can_be_served_from_is_refused(
    columns: dict[str, list], message: str, trained: Trained, save: Save
) -> None:
    with pytest.raises(GenattError, match=message):
        read_requests(save("u.csv", **columns), trained)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gone.csv", None, "does not exist"),
        ("empty.csv", b"", r"cannot read .*empty.csv"),
        ("header.csv", b"user_id\n", "has no rows"),
        ("broken.parquet", b"PAR1 not really", r"cannot read .*broken.parquet"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(
    name: str, content: bytes | None, message: str, trained: Trained, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(GenattError, match=message) as caught:
        read_requests(tmp_path / name, trained)
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def labelled(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Trained, dict[int, set[str]]]:
    """A model of data with genres, and the genres by original id."""
    path = Path(shutil.copytree(prepared, tmp_path_factory.mktemp("labelled") / "tiny"))
    sets = add_genres(path, NUM_ITEMS)
    trained = make(path)
    return trained, {word: sets[dense] for dense, word in dense_words(trained).items()}


def best_of(whole: list[int], sets: dict[int, set[str]], wanted: set[str], k: int) -> list[int]:
    """The first k of a list of all items that have one of the categories wanted; of any where none is."""
    return [item for item in whole if not wanted or sets[item] & wanted][:k]


@pytest.mark.parametrize("only", [["Drama"], ["War", "Sci-Fi/Space"], list(GENRES)])
def test_lists_of_categories_are_what_is_left_of_whole_lists(
    only: list[str], labelled: tuple[Trained, dict[int, set[str]]], save: Save
) -> None:
    trained, sets = labelled
    requests = read_requests(save("u.csv", user_id=[103, 110, 120, 141]), trained)
    whole = lists_of(recommend(trained, requests, NUM_ITEMS))
    for k in (4, NUM_ITEMS):  # fewer than asked for where no more have one
        found = lists_of(recommend(trained, requests, k, only=only))
        assert found == {user: best_of(items, sets, set(only), k) for user, items in whole.items()}


@pytest.mark.parametrize("kind", ["users", "histories"])
@pytest.mark.parametrize("only", [[], ["Comedy"]])
def test_each_request_may_name_its_categories(
    kind: str, only: list[str], labelled: tuple[Trained, dict[int, set[str]]], save: Save
) -> None:
    """In rows or in lists; who names none gets what is asked for all."""
    trained, sets = labelled
    wanted: dict[int, list[str | None]] = {103: ["War"], 110: [None], 120: ["Drama", "Western"], 141: ["War"]}
    if kind == "users":
        pairs = [(user, name) for user, names in wanted.items() for name in names]
        path = save("u.csv", user_id=[user for user, _ in pairs], wanted=[name for _, name in pairs])
    else:
        log = log_of([user - 100 for user in wanted])
        path = save("h.parquet", **log, wanted=[[name for name in wanted[user] if name] for user in log["user_id"]])
    requests = read_requests(path, trained, "wanted")
    whole = lists_of(recommend(trained, read_requests(path, trained), NUM_ITEMS))
    found = lists_of(recommend(trained, requests, 5, only=only))
    for user, items in whole.items():
        own = {name for name in wanted[user] if name} or set(only)
        assert found.get(user, []) == best_of(items, sets, own, 5)


def test_categories_that_cannot_be_served_are_one_line(
    trained: Trained, labelled: tuple[Trained, dict[int, set[str]]], save: Save
) -> None:
    path = save("u.csv", user_id=[105], number=[3], wanted=["Darma"])
    with pytest.raises(GenattError, match=r"has no column genre: it has user_id, number, wanted"):
        read_requests(path, labelled[0], "genre")
    with pytest.raises(GenattError, match=r"column number holds Int64: categories are text"):
        read_requests(path, labelled[0], "number")
    with pytest.raises(GenattError, match=r"'Darma' is not among the 5 of column genres: did you mean 'Drama'"):
        recommend(labelled[0], read_requests(path, labelled[0], "wanted"), 3)
    with pytest.raises(GenattError, match=r"has no column that is plainly categories"):
        recommend(trained, read_requests(path, trained), 3, only=["Drama"])


@pytest.mark.parametrize("k", [0, -1, 41])
def test_k_outside_the_catalogue_is_refused(k: int, trained: Trained, save: Save) -> None:
    requests = read_requests(save("u.csv", user_id=[105]), trained)
    with pytest.raises(GenattError, match=f"k={k} is not between 1 and the catalogue's 40 items"):
        recommend(trained, requests, k)


def test_the_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    table = pl.DataFrame({"user_id": [1], "rank": [1], "item_id": [2], "score": [0.5]})
    write(table, tmp_path / "new" / "top.parquet")
    assert pl.read_parquet(tmp_path / "new" / "top.parquet").equals(table)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["top.parquet"]
    (tmp_path / "file").write_text("")
    with pytest.raises(GenattError, match=r"cannot write .*file/top.parquet.*choose another --out"):
        write(table, tmp_path / "file" / "top.parquet")
