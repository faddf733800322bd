"""Sections add up to the step, cost next to nothing, and are ranges of a profile only while one is made."""

import itertools
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from genatt_dist.training import timing
from genatt_dist.training.timing import SECTIONS, SectionTimer

CPU = torch.device("cpu")


def test_seconds_of_a_section_add_up_until_they_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing.time, "perf_counter", itertools.count(0.0, 0.5).__next__)
    timer = SectionTimer(CPU)
    for name in ("forward", "backward", "forward"):
        with timer[name]:
            assert timer.current == name
        assert timer.current == ""
    assert timer.take() == {"input": 0, "lookup": 0, "forward": 1.0, "backward": 0.5, "optimizer": 0}
    assert set(timer.take().values()) == {0}


def test_waiting_gives_the_same_items_and_takes_the_time_of_their_making(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now)

    def slow() -> Iterator[int]:
        nonlocal now
        for number in range(3):
            now += 2.0
            yield number

    timer, found = SectionTimer(CPU), []
    for item in timer.waiting(slow()):
        found.append(item)
        now += 5.0
    assert found == [0, 1, 2]
    assert timer.take()["input"] == 6.0


def test_a_section_that_fails_is_left() -> None:
    timer = SectionTimer(CPU)
    with pytest.raises(ValueError, match="inside"), timer["forward"]:
        raise ValueError("inside")
    assert timer.current == ""
    with timer["forward"]:
        pass


def test_sections_are_ranges_of_a_profile_while_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    timer = SectionTimer(CPU)
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        for name in SECTIONS:
            with timer[name]:
                torch.ones(2).sum()
    assert {event.key for event in profiled.key_averages()} >= set(SECTIONS)

    def refused(name: str) -> None:
        raise AssertionError(f"a range {name} without a profiler")

    monkeypatch.setattr(timing.profiler, "record_function", refused)
    with timer["forward"]:
        pass


def test_on_a_gpu_events_are_read_only_when_taken_and_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    clock = itertools.count(0.0, 2.0)

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing
            self.waited = False
            made.append(self)

        def record(self) -> None:
            self.at = next(clock)

        def synchronize(self) -> None:
            self.waited = True

        def elapsed_time(self, end: "Event") -> float:
            return end.at - self.at

    monkeypatch.setattr(timing.torch, "cuda", SimpleNamespace(Event=Event))
    timer = SectionTimer(torch.device("cuda"))
    for _ in range(2):
        for _ in range(3):
            with timer["forward"]:
                pass
        assert not any(event.waited for event in made)
        taken = timer.take()
        assert taken["forward"] == pytest.approx(3 * 2.0 / 1e3)  # milliseconds
        assert taken["backward"] == 0
        assert [event.waited for event in made] == [False] * 5 + [True]
        made[-1].waited = False
    assert len(made) == 6


def test_five_sections_cost_microseconds() -> None:
    """Of a step of milliseconds; the best of several rounds, so that a busy machine does not count."""
    timer, fastest = SectionTimer(CPU), 1.0
    for _ in range(20):
        started = time.perf_counter()
        for _ in range(100):
            for name in SECTIONS:
                with timer[name]:
                    pass
        fastest = min(fastest, (time.perf_counter() - started) / 100)
    print(f"five sections: {1e6 * fastest:.1f} µs")
    assert fastest < 50e-6
