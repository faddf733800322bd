"""Logs and options at the edge of what is allowed: the answer is right, or one line that says what to mend."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import polars as pl
import pytest
from in_process import prepare
from pydantic import ValidationError
from ray.exceptions import GetTimeoutError

from data_pipeline import local_ray, vocabulary
from data_pipeline.config import PrepareConfig
from data_pipeline.errors import GenattError
from data_pipeline.format import load_manifest, read_index, read_shard, read_vocabulary

Options = Callable[..., PrepareConfig]
LEAST, MOST = -(1 << 63), (1 << 63) - 1
EVENTS = ["a", "b", None, "a"]


@pytest.fixture
def four_rows(log: Callable[..., str]) -> str:
    return log(user_id=[1, 1, 2, 2], item_id=[1, 2, 1, 3], timestamp=[0, 1, 0, 1], event=EVENTS)


def refusal(config: PrepareConfig) -> str:
    with pytest.raises(GenattError) as caught:
        prepare(config)
    assert not Path(config.out).exists()
    return str(caught.value)


def sequences(config: PrepareConfig) -> dict:
    """Original item ids, times, and (train, valid, test) of each user."""
    manifest = load_manifest(config.out)
    words = dict(
        zip(*(read_vocabulary(config.out, manifest)[name].to_pylist() for name in ("dense_id", "item_id")), strict=True)
    )
    found = {}
    for file in manifest.files:
        index = read_index(config.out, file).to_pylist()
        for row, place in zip(read_shard(config.out, file).to_pylist(), index, strict=True):
            items = [words[item] for item in row["item_ids"]]
            found[row["user_id"]] = (items, row["timestamps"], (place["train"], place["valid"], place["test"]))
    return found


def test_nothing_is_published_when_every_row_is_dropped_in_reading(four_rows: str, options: Options) -> None:
    message = refusal(options(four_rows, event_column="event", event_weights={"A": 1}))
    assert message.startswith("source log: none of 4 rows is left after reading: 4 event_without_weight: mend event_")


def test_nothing_is_published_when_every_item_is_rare(four_rows: str, options: Options) -> None:
    assert refusal(options(four_rows, min_count=3)).startswith(
        "no rows left of 4: no item has 3 rows: lower min_count, or set out_of_vocabulary=bucket"
    )
    assert prepare(options(four_rows, min_count=3, out_of_vocabulary="bucket")).num_interactions == 4


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), -1, 1e300])
def test_a_weight_that_nobody_can_train_with_is_refused(four_rows: str, options: Options, weight: float) -> None:
    with pytest.raises(ValidationError, match=r"a=.*: a weight is a number from 0"):
        options(four_rows, event_column="event", event_weights={"a": weight, "b": 1})


def test_event_types_that_are_numbers(log: Callable[..., str], options: Options) -> None:
    path = log(user_id=[1, 1, 2], item_id=[1, 2, 1], timestamp=[0, 1, 2], event=[1, 2, 1])
    assert prepare(options(path, event_column="event", event_weights={1: 2})).num_interactions == 2


def test_a_value_that_ray_cannot_give_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_ray.ray, "get", mock.Mock(side_effect=GetTimeoutError("Get timed out:\nan object")))
    with pytest.raises(GenattError) as caught:
        local_ray.value_of(None, "order")
    assert str(caught.value) == (
        "stage order failed in Ray: GetTimeoutError: Get timed out: an object: see Ray's own logs, then try again"
    )


@pytest.mark.parametrize("option", ["seed", "hash_buckets", "row_group_size", "rows_per_block"])
def test_numbers_are_bounded_by_what_they_are_kept_in(four_rows: str, options: Options, option: str) -> None:
    with pytest.raises(ValidationError, match="less than or equal to 2147483647"):
        options(four_rows, **{option: 1 << 31})
    if option != "hash_buckets":
        assert prepare(options(four_rows, **{option: (1 << 31) - 1})).num_interactions == 4


def test_the_widest_ids_and_times_come_back_as_they_were(log: Callable[..., str], options: Options) -> None:
    path = log(
        user_id=[MOST, LEAST, MOST, LEAST, MOST],
        item_id=[LEAST, MOST, MOST, LEAST, 0],
        timestamp=[MOST, LEAST, LEAST, MOST, 0],
    )
    config = options(path, num_shards=1)
    prepare(config)
    assert sequences(config) == {
        LEAST: ([MOST, LEAST], [LEAST, MOST], (2, -1, -1)),
        MOST: ([MOST, 0, LEAST], [LEAST, 0, MOST], (1, 1, 2)),
    }


def test_item_counts_merged_along_the_way_are_the_same(
    log: Callable[..., str], options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = log(user_id=list(range(60)), item_id=[number % 7 for number in range(60)], timestamp=[0] * 60)
    monkeypatch.setattr("data_pipeline.prepare.MERGE_ROWS", 10)
    with mock.patch.object(vocabulary, "merge", wraps=vocabulary.merge) as merge:
        config = options(path, num_shards=12)
        manifest = prepare(config)
    assert 3 <= merge.call_count <= 12
    assert all(sum(table.height for table in call.args[0][1:]) < 20 for call in merge.call_args_list)
    rows = pl.DataFrame(read_vocabulary(config.out, manifest)).select("item_id", "count").rows()
    assert Counter(dict(rows)) == Counter(number % 7 for number in range(60))
