"""Who is lost, who hangs, and what the others are told: from signs of life alone."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from genatt_dist.training.signs import (
    CHECKPOINT,
    OPERATIONS,
    SET_UP,
    UPDATE,
    VALIDATION,
    Limits,
    Sign,
    hanging,
    is_lost_peer,
    lost,
)

FORWARD, INPUT, BACKWARD = UPDATE["forward"], UPDATE["input"], UPDATE["backward"]
LIMITS = Limits.of(30.0, 600.0, 1800.0)


def sign(rank: int, operation: str = FORWARD, step: int = 7, seconds: float = 1.0, **others: object) -> Sign:
    return Sign(rank, f"h{rank}", 100 + rank, 5, step, 0, operation, seconds, **others)  # type: ignore[arg-type]


def test_a_sign_travels_as_text() -> None:
    one = sign(3, BACKWARD, ended="finished", broken=True)
    assert Sign.of(one.text()) == one


def test_silent_ranks_are_named_with_their_last_place() -> None:
    signs = [sign(0), sign(1, BACKWARD), sign(2), sign(3, ended="finished"), sign(4, INPUT, 8)]
    assert lost(signs, dict.fromkeys(range(5), 29.0), 30.0) is None
    assert lost(signs, {0: 0.0, 1: 31.0, 2: 0.0, 3: 99.0, 4: 0.0}, 30.0) == (
        "rank 1 (host h1, pid 101) is lost: no sign of life for 31 s, the last one in backward of step 7 (epoch 1); "
        "ranks 0, 2 are in forward of step 7 (epoch 1); rank 3 ended (finished); "
        "rank 4 is in waiting for a batch of step 8 (epoch 1)"
    )


def test_many_lost_ranks_stay_one_line() -> None:
    text = lost([sign(rank) for rank in range(1000)], {rank: 40.0 * (rank > 0) for rank in range(1000)}, 30.0)
    assert text is not None
    assert "rank 3 (host h3" in text
    assert "and 996 more ranks" in text
    assert len(text) < 500


def test_who_holds_the_others_up_hangs() -> None:
    assert hanging([sign(0, seconds=599.0), sign(1, seconds=599.0)], LIMITS) is None
    signs = [sign(0, seconds=601.0), sign(1, INPUT, seconds=601.0), sign(2, seconds=600.5)]
    assert hanging(signs, LIMITS) == (
        "rank 1 (host h1, pid 101) hangs in waiting for a batch of step 7 (epoch 1), for 601 s; "
        "ranks 0, 2 are in forward of step 7 (epoch 1)"
    )
    text = hanging([sign(0, seconds=601.0), sign(1, seconds=610.0)], LIMITS)
    assert text is not None
    assert text.startswith("all ranks hang in forward of step 7 (epoch 1), for 610 s: look at the network")
    alone = hanging([sign(0, seconds=601.0)], LIMITS)
    assert alone is not None
    assert alone.startswith("rank 0 (host h0, pid 100) hangs in forward")


@pytest.mark.parametrize(("operation", "seconds"), [(VALIDATION, 1800), (SET_UP, 1800), (CHECKPOINT, 2400)])
def test_long_operations_have_longer_limits(operation: str, seconds: float) -> None:
    assert hanging([sign(0, operation, seconds=seconds - 1)], LIMITS) is None
    assert hanging([sign(0, operation, seconds=seconds + 1)], LIMITS)
    assert LIMITS.longest == 2400


@given(st.lists(st.tuples(st.sampled_from(OPERATIONS), st.integers(1, 3)), min_size=1, max_size=6), st.randoms())
def test_the_one_behind_is_always_among_the_named(places: list[tuple[str, int]], order: random.Random) -> None:
    signs = [sign(rank, operation, step, 5000.0) for rank, (operation, step) in enumerate(places)]
    behind = [one.rank for one in signs if one.place == min(other.place for other in signs)]
    order.shuffle(signs)
    text = hanging(signs, LIMITS)
    assert text is not None
    assert "\n" not in text
    if len(behind) < len(signs):
        assert all(f"rank {rank} (host h{rank}, pid {100 + rank}) hangs" in text for rank in sorted(behind)[:1])
    elif len(signs) > 1:
        assert text.startswith("all ranks hang")


def test_what_libraries_say_of_a_lost_peer_is_known() -> None:
    assert is_lost_peer(RuntimeError("[enforce fail] gloo/pair.cc:1] Connection closed by peer [127.0.0.1]:1"))
    assert is_lost_peer(RuntimeError("Timed out waiting 10000ms for recv operation to complete"))
    assert not is_lost_peer(RuntimeError("shapes do not fit"))
