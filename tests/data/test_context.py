"""Times become context: which hour and which gap an input has, and that no target's time is ever seen."""

import datetime
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest
import torch
from feature_data import CONTEXT, FEATURES, write_with_features
from tiny_data import histories, run_config, write_prepared

from data_pipeline.errors import GenattError
from data_pipeline.format import load_manifest
from genatt_dist.config import RunConfig
from genatt_dist.data.arrays import EVENT, seconds_of
from genatt_dist.data.batches import Batch, TrainingBatches
from genatt_dist.data.context import gap, hour_of_week, seconds, seconds_of_column
from genatt_dist.data.histories import evaluation_batches
from genatt_dist.data.sequences import Sequences

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "timed"
    write_with_features(path, histories(users=60))
    return path


def config_of(path: Path, features: list[dict[str, object]] = FEATURES, **data: object) -> RunConfig:
    return run_config(path, data=data).model_copy(update={"features": run_features(path, features)})


def run_features(path: Path, features: list[dict[str, object]]) -> object:
    return RunConfig.model_validate({"data": {"path": str(path)}, "features": features}).features


def opened(config: RunConfig) -> Sequences:
    return Sequences.read(config.data.path, prefetch_bytes=config.data.prefetch_bytes, features=config.features)


def batches_of(config: RunConfig, rank: int = 0, ranks: int = 1) -> list[Batch]:
    return list(TrainingBatches.plan(opened(config), config.data, config.training).iterate(0, 0, rank, ranks, CPU))


def test_hours_are_those_of_the_calendar() -> None:
    moments = np.array([0, 3599, 3600, 4 * 86_400 - 1, 4 * 86_400, 1_700_000_000, -1])
    expected = []
    for moment in moments.tolist():
        date = datetime.datetime.fromtimestamp(moment, datetime.UTC)
        expected.append(1 + 24 * date.weekday() + date.hour)
    assert hour_of_week(moments, np.array([0])).tolist() == expected


def test_gaps_are_binary_orders_of_magnitude_and_the_first_input_has_none() -> None:
    times = np.cumsum([5, 0, 1, 2, 3, 4, 7, 8, 2**30, 2**31, 2**40])
    assert gap(times, np.array([0])).tolist() == [1, 2, 3, 4, 4, 5, 5, 6, 33, 34, 34]
    assert gap(np.array([5, 6, 3, 3]), np.array([0, 2])).tolist() == [1, 3, 1, 2]
    assert gap(np.array([9, 3]), np.array([0])).tolist() == [1, 2], "times that fall count as equal"


@pytest.mark.parametrize(("unit", "factor"), [("s", 1), ("ms", 10**3), ("us", 10**6), ("ns", 10**9)])
def test_units_are_whole_seconds(unit: str, factor: int) -> None:
    moments = np.array([0, 1_600_000_000, -5])
    assert seconds(moments * factor + factor // 2, unit, "-").tolist() == moments.tolist()


def test_data_without_times_is_refused_when_a_feature_needs_them(tmp_path: Path) -> None:
    write_prepared(tmp_path / "data", histories())
    with pytest.raises(GenattError, match=r"features\.hour_of_week: tiny has no times \(time unit not known\)"):
        Sequences.read(str(tmp_path / "data"), features=run_features(tmp_path, CONTEXT))


def plain_times(path: Path) -> dict[int, list[int]]:
    """Times of each user's events, by the user's index, read with Arrow alone."""
    tables = [pq.read_table(path / file.path) for file in load_manifest(str(path)).files]
    return dict(enumerate(times for table in tables for times in table["timestamps"].to_pylist()))


@pytest.mark.parametrize("windows", ["last", "all"])
def test_a_training_position_reads_its_own_time_and_the_one_before(path: Path, windows: str) -> None:
    times, config = plain_times(path), config_of(path, CONTEXT, windows=windows, max_len=5)
    lengths = {user: len(mine) for user, mine in times.items()}
    seen = 0
    for batch in batches_of(config):
        for row, window in enumerate(batch.window_B.tolist()):
            user, number = window >> 20, window % (1 << 20)
            train = lengths[user] - 2 if lengths[user] >= 3 else lengths[user]
            end = train - 1 - number * 5
            mine = np.array(times[user][max(0, end - 5) : end])
            here = batch.layout.row_N == row
            assert batch.features["hour_of_week"].row_K[here].tolist() == hour_of_week(mine, np.array([0])).tolist()
            assert batch.features["gap"].row_K[here].tolist() == gap(mine, np.array([0])).tolist()
            seen += len(mine)
    assert seen == sum(batch.num_tokens for batch in batches_of(config))


def test_no_batch_depends_on_the_time_of_a_held_out_event_or_of_a_last_target(path: Path, tmp_path: Path) -> None:
    """The same data with every user's last time moved: only inputs may know a time, and the last one never is one."""
    moved = tmp_path / "moved"
    write_with_features(moved, histories(users=60), last_later=12_345_678)
    assert plain_times(moved) != plain_times(path)
    for split in ("valid", "test"):
        here, there = (
            [batch.features for batch in evaluation_batches(opened(config_of(where, CONTEXT)), split, 8, 20, 0, 1, CPU)]
            for where in (path, moved)
        )
        assert same(here, there)
    here, there = ([batch.features for batch in batches_of(config_of(where, CONTEXT))] for where in (path, moved))
    assert same(here, there)


def same(here: list[dict], there: list[dict]) -> bool:
    return len(here) == len(there) > 0 and all(
        torch.equal(a[name].row_K, b[name].row_K) for a, b in zip(here, there, strict=True) for name in a
    )


def test_evaluation_reads_what_training_would_at_the_same_place(path: Path) -> None:
    """The history before the validation item is the training part: cut to the model's length, it has the same rows."""
    config = config_of(path, max_len=8)
    times = plain_times(path)
    for batch in evaluation_batches(opened(config), "valid", 8, 7, 0, 1, CPU):
        for row, user in enumerate(batch.user_B.tolist()):
            mine = np.array(times[user][:-2][-8:])
            here = batch.layout.row_N == row
            assert batch.features["gap"].row_K[here].tolist() == gap(mine, np.array([0])).tolist()
            assert batch.features["hour_of_week"].row_K[here].tolist() == hour_of_week(mine, np.array([0])).tolist()


def test_features_of_two_ranks_are_those_of_one_and_small_memory_changes_nothing(path: Path) -> None:
    whole = by_window(batches_of(config_of(path)))
    assert by_window(batches_of(config_of(path), 0, 2) + batches_of(config_of(path), 1, 2)) == whole
    assert by_window(batches_of(config_of(path, prefetch_bytes=1 << 16, shuffle_windows=10))) == whole


def by_window(batches: list[Batch]) -> dict[int, dict[str, list[list[int]]]]:
    """window → feature → rows at each position."""
    found: dict[int, dict[str, list[list[int]]]] = {}
    for batch in batches:
        for name, read in batch.features.items():
            bags = np.split(read.row_K.numpy(), read.first_N.numpy()[1:])
            for row, bag in zip(batch.layout.row_N.tolist(), bags, strict=True):
                window = found.setdefault(int(batch.window_B[row]), {})
                window.setdefault(name, []).append(bag.tolist())
    return found


def test_times_are_read_only_when_a_context_feature_asks(path: Path) -> None:
    without = Sequences.read(str(path), features=run_features(path, FEATURES[:2]))
    events, _ = without.take(without.offsets[:1], without.lengths[:1])
    assert events.dtype == np.int32
    assert without.groups._bytes(0) == 4 * without.groups.first_item_G[1]
    timed = opened(config_of(path))
    events, _ = timed.take(timed.offsets[:1], timed.lengths[:1])
    assert events.dtype == EVENT
    assert seconds_of(events).tolist() == plain_times(path)[0]
    assert timed.groups._bytes(0) == EVENT.itemsize * timed.groups.first_item_G[1], "what is read ahead is counted"


def test_times_of_requests() -> None:
    moment = datetime.datetime(2020, 1, 2, 3, 4, 5)
    expected = [int(moment.replace(tzinfo=datetime.UTC).timestamp())]
    assert seconds_of_column(pl.Series([moment]), "ms", "-").tolist() == expected
    assert seconds_of_column(pl.Series(["2020-01-02T03:04:05"]), "ms", "-").tolist() == expected
    assert seconds_of_column(pl.Series([expected[0] * 1000]), "ms", "-").tolist() == expected
    for bad in (["soon"], [None]):
        with pytest.raises(GenattError, match=r"requests\.csv: its times cannot be read"):
            seconds_of_column(pl.Series("time", bad), "s", "requests.csv")
