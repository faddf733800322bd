"""The three rules against plain Python, user by user."""

from typing import Any

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from data_pipeline.errors import GenattError
from data_pipeline.splits import LeaveOneOut, RandomUsers, TimePoint, parse_split

lengths = st.lists(st.integers(1, 6), max_size=12)
histories = st.lists(st.lists(st.integers(-3, 12), min_size=1, max_size=8).map(sorted), max_size=12)


def sequences(times: list[list[int]], users: list[Any] | None = None) -> pl.DataFrame:
    """A shard's rows, of users 0, 1, … unless named."""
    return pl.DataFrame(
        {
            "user_id": list(range(len(times))) if users is None else users,
            "item_ids": [[1] * len(one) for one in times],
            "timestamps": times,
        },
        schema_overrides={"item_ids": pl.List(pl.Int32), "timestamps": pl.List(pl.Int64)},
    )


def found(rule: LeaveOneOut | TimePoint | RandomUsers, rows: pl.DataFrame) -> list[tuple[int, int, int]]:
    places = rule.places(rows)
    assert dict(places.schema) == {"train": pl.Int32, "valid": pl.Int32, "test": pl.Int32}
    return places.rows()


@settings(max_examples=50, deadline=None)
@given(lengths=lengths, least=st.integers(3, 5))
def test_leave_one_out(lengths: list[int], least: int):
    expected = [(n - 2, n - 2, n - 1) if n >= least else (n, -1, -1) for n in lengths]
    assert found(LeaveOneOut(min_length=least), sequences([[0] * n for n in lengths])) == expected


@settings(max_examples=50, deadline=None)
@given(times=histories, valid_from=st.integers(-4, 12), later=st.integers(1, 6))
def test_time_point(times: list[list[int]], valid_from: int, later: int):
    test_from = valid_from + later

    def places(mine: list[int]) -> tuple[int, int, int]:
        train = sum(time < valid_from for time in mine)
        valid = [place for place, time in enumerate(mine) if valid_from <= time < test_from]
        test = [place for place, time in enumerate(mine) if test_from <= time]
        return train, *(after[0] if after and after[0] > 0 else -1 for after in (valid, test))

    assert found(TimePoint(valid_from=valid_from, test_from=test_from), sequences(times)) == [
        places(one) for one in times
    ]


@settings(max_examples=50, deadline=None)
@given(lengths=lengths, valid=st.floats(0.01, 0.49), test=st.floats(0.01, 0.49), seed=st.integers(0, 5))
def test_random_users(lengths: list[int], valid: float, test: float, seed: int):
    rule = RandomUsers(valid_share=valid, test_share=test, seed=seed)
    drawn = found(rule, sequences([[0] * n for n in lengths]))
    for n, places in zip(lengths, drawn, strict=True):
        held_out = [(0, n - 1, -1), (0, -1, n - 1)] if n > 1 else [(0, -1, -1)]
        assert places in [(n, -1, -1), *held_out]
    # Nothing but a user's own id decides: not who else is there, nor where, nor what anybody did.
    alone = [found(rule, sequences([[0] * n], [user]))[0] for user, n in enumerate(lengths)]
    assert drawn == alone
    longer = found(rule, sequences([[0] * (n + 2) for n in lengths]))
    assert [train == 0 for train, *_ in drawn] == [train == 0 for train, *_ in longer]


@pytest.mark.parametrize("named", [False, True])
def test_random_users_are_as_many_as_asked(named: bool):
    count = 20_000
    users = [f"user {number}" for number in range(count)] if named else None
    rows = sequences([[0, 1]] * count, users)
    drawn = found(RandomUsers(valid_share=0.1, test_share=0.25), rows)
    shares = [sum(places[which] >= 0 for places in drawn) / count for which in (1, 2)]
    assert shares == pytest.approx([0.1, 0.25], abs=0.012)  # four standard deviations
    other = found(RandomUsers(valid_share=0.1, test_share=0.25, seed=1), rows)
    both = sum(one[2] >= 0 and two[2] >= 0 for one, two in zip(drawn, other, strict=True)) / count
    assert both == pytest.approx(0.25**2, abs=0.01)


def test_no_users():
    for rule in (LeaveOneOut(), TimePoint(valid_from=1, test_from=2), RandomUsers(valid_share=0.1, test_share=0.1)):
        assert found(rule, sequences([])) == []


@settings(max_examples=50, deadline=None)
@given(times=histories, bounds=st.tuples(st.integers(0, 9), st.integers(0, 9)))
def test_training_never_sees_a_target(times: list[list[int]], bounds: tuple[int, int]):
    rules = [LeaveOneOut(), RandomUsers(valid_share=0.4, test_share=0.4)]
    if bounds[0] < bounds[1]:
        rules.append(TimePoint(valid_from=bounds[0], test_from=bounds[1]))
    for rule in rules:
        for mine, (train, valid, test) in zip(times, found(rule, sequences(times)), strict=True):
            assert 0 <= train <= len(mine)
            assert all(target == -1 or max(train, 1) <= target < len(mine) for target in (valid, test))
            assert valid == -1 or test == -1 or valid < test


def test_what_can_be_typed():
    assert parse_split("leave_one_out") == {"rule": "leave_one_out"}
    assert parse_split("time:5, -3") == {"rule": "time", "valid_from": 5, "test_from": -3}
    assert parse_split("time:2024-01-01,20") == {"rule": "time", "valid_from": "2024-01-01", "test_from": 20}
    assert parse_split("users:0.1,0.2") == {"rule": "users", "valid_share": "0.1", "test_share": "0.2"}
    for wrong in ("", "leave_one_out:3", "time", "time:1", "time:1,2,3", "users:0.1", "random:0.1,0.1"):
        with pytest.raises(ValueError, match="give leave_one_out, time:VALID_FROM,TEST_FROM or users"):
            parse_split(wrong)


@pytest.mark.parametrize(
    ("valid_from", "test_from"),
    [(5, 5), (6, 5), ("2024-01-02", "2024-01-01"), ("2024-01-01T23:00:00-05:00", "2024-01-02")],
)
def test_times_out_of_order(valid_from: int | str, test_from: int | str):
    with pytest.raises(ValidationError, match=f"valid_from={valid_from} must lie before test_from={test_from}"):
        TimePoint(valid_from=valid_from, test_from=test_from)


def test_times_that_are_resolved():
    zones = TimePoint(valid_from="2024-01-02T00:00:00+05:00", test_from="2024-01-01T23:00:00")
    assert zones.resolved({"2024-01-02T00:00:00+05:00": 19, "2024-01-01T23:00:00": 23}.__getitem__) == TimePoint(
        valid_from=19, test_from=23
    )
    mixed = TimePoint(valid_from="2024-01-01", test_from=5)
    with pytest.raises(GenattError, match=r"^split time:2024-01-01,5: in the unit of the times these are 9 and 5"):
        mixed.resolved(lambda time: 9 if time == "2024-01-01" else int(time))
    assert TimePoint(valid_from="soon", test_from="later")  # what is no date is told once the unit is known


def test_shares_that_leave_nobody():
    with pytest.raises(ValidationError, match="leave no user to train"):
        RandomUsers(valid_share=0.5, test_share=0.5)
