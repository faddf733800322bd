"""What a features section may say, and what is told when it cannot work."""

from typing import Any

import pytest
import yaml

from data_pipeline.errors import GenattError
from genatt_dist import config as configuration
from genatt_dist.config import RunConfig

GENRES = {"type": "attribute", "column": "genres"}


def parse(features: Any, **sections: Any) -> RunConfig:
    return configuration.parse({"data": {"path": "shards"}, "features": features, **sections}, "run.yaml")


def test_a_feature_is_called_as_its_column_unless_it_says_otherwise() -> None:
    features = parse([GENRES, GENRES | {"name": "main_genre", "max_values": 1}, {"type": "context", "column": "gap"}])
    assert [feature.name for feature in features.features] == ["genres", "main_genre", "gap"]
    assert configuration.parse(yaml.safe_load(configuration.dump(features)), "again") == features


def test_a_run_has_no_features_unless_it_names_some() -> None:
    assert configuration.parse({"data": {"path": "shards"}}, "run.yaml").features == ()


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ([GENRES | {"type": "attributes"}], "features.0.type=attributes is unknown: did you mean attribute? use"),
        ([{"column": "genres"}], "features.0.type is missing: use attribute, context"),
        ([{"type": "attribute"}], "features.0.column is missing"),
        ([GENRES | {"bucket": 9}], "unknown key features.0.bucket: did you mean features.0.buckets?"),
        ([GENRES | {"buckets": 0}], "features.0.buckets=0"),
        ([{"type": "attribute", "column": "Main genre"}], "features.0.name='Main genre'"),
        ([GENRES | {"name": "item"}], "features.0: name=item is the item table's own: give the feature another name"),
        ([{"type": "context", "column": "weight"}], "features.0.column='weight': input should be 'hour_of_week' or"),
        ([GENRES, GENRES], "features has name=genres twice: give one of them another name"),
        ([GENRES | {"table": "sharded"}], "features.genres.table=sharded with table.kind=replicated"),
    ],
)
def test_what_cannot_work_is_refused_when_the_configuration_is_read(features: Any, message: str) -> None:
    with pytest.raises(GenattError) as told:
        parse(features)
    assert message in str(told.value)
    assert "\n" not in str(told.value)


def test_sharded_features_go_with_a_sharded_item_table() -> None:
    (feature,) = parse([GENRES | {"table": "sharded"}], table={"kind": "sharded"}).features
    assert feature.sharded
