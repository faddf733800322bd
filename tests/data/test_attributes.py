"""Attributes become rows of a table: which value has which, which item has which, and what is refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from feature_data import attributes_of, write_with_features
from tiny_data import histories, write_prepared

from data_pipeline.errors import GenattError
from genatt_dist.data.attributes import ItemValues, values_of
from genatt_dist.data.sequences import Sequences
from genatt_dist.embedding.feature_options import AttributeFeature


def read(values: list[Any], kind: pa.DataType | None = None, **options: Any) -> ItemValues:
    whole = pa.array(values, kind)
    column = pa.chunked_array([whole[:2], whole[2:]])
    return values_of(column, AttributeFeature(column="genres", **options))


def rows(values: ItemValues) -> list[list[int]]:
    """Rows of the items 1, 2 ….."""
    found, first = values.of(np.arange(1, len(values.first) - 1, dtype=np.int32))
    return [part.tolist() for part in np.split(found, first[1:])]


def test_values_have_rows_in_the_order_of_the_items_that_have_them() -> None:
    values = read([["b", "a"], None, ["c", "a", None, "a"], [], ["d"]])
    assert rows(values) == [[1, 2], [], [3, 2], [], [4]]
    assert values.num_rows == 5


def test_one_value_an_item_and_all_its_types() -> None:
    expected = [[1], [], [2], [1]]
    for kind in (pa.int8(), pa.int64(), pa.list_(pa.int32()), pa.large_list(pa.int64())):
        plain = [7, None, 1, 7]
        listed = [None if value is None else [value] for value in plain]
        assert rows(read(listed if kind.num_fields else plain, kind)) == expected
    text = ["x", None, "y", "x"]
    for kind in (pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())):
        assert rows(read(text, kind)) == expected


def test_items_may_be_asked_in_any_order_and_again_and_padding_has_nothing() -> None:
    values = read([["b", "a"], [], ["c", "a"]])
    found, first = values.of(np.array([3, 0, 1, 3], np.int32))
    assert found.tolist() == [3, 2, 1, 2, 3, 2]
    assert first.tolist() == [0, 2, 2, 4]
    assert values.of(np.zeros(0, np.int32))[0].tolist() == []


def test_max_values_keeps_the_first_ones() -> None:
    assert rows(read([["b", "a", "c"], ["c", "d"], ["a"]], max_values=1)) == [[1], [2], [3]]


def test_a_value_falls_into_the_same_bucket_in_every_data_set() -> None:
    first, other = read([["b", "a"], ["c"], ["d"]], buckets=3), read([["d"], ["a"], ["b", "c"]], buckets=3)
    (b, a), (c,), (d,) = rows(first)
    assert rows(other) == [[d], [a], [b, c]]
    assert {a, b, c, d} <= {1, 2, 3}
    assert first.num_rows == 4


def test_rows_stay_when_items_are_added() -> None:
    """A data set that descends from another keeps its items' dense ids, so values of old items keep their rows."""
    genres = attributes_of(60)["genres"]
    assert rows(read(genres))[:40] == rows(read(genres[:40]))


@pytest.mark.parametrize("values", [[1.5, 2.0, 3.0], [[1.5], [2.0], []], [{"a": 1}, None, None]])
def test_columns_without_text_or_whole_numbers_are_refused(values: list[Any]) -> None:
    with pytest.raises(GenattError, match=r"features\.genres: column 'genres' of the vocabulary holds .*not text or"):
        read(values)


def test_a_column_without_any_value_is_refused() -> None:
    with pytest.raises(GenattError, match=r"features\.genres: no item has a value in column 'genres'"):
        read([None, [], None], pa.list_(pa.string()))


def test_a_missing_column_is_named_with_those_there_are(tmp_path: Path) -> None:
    write_with_features(tmp_path / "with", histories())
    write_prepared(tmp_path / "without", histories())
    feature = (AttributeFeature(column="genre"),)
    with pytest.raises(GenattError, match=r"features\.genre: .* no item attribute 'genre': name one of genres, year"):
        Sequences.read(str(tmp_path / "with"), features=feature)
    with pytest.raises(GenattError, match="it has none; prepare it with --items FILE"):
        Sequences.read(str(tmp_path / "without"), features=feature)
