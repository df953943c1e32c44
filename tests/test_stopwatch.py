"""Time per stage, against a clock that the test sets."""

import pytest
import torch

from flatllmcore.core import stopwatch
from flatllmcore.core.stopwatch import Stopwatch


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(stopwatch, "time", clock)
    return clock


@pytest.fixture
def watch(clock):
    return Stopwatch(torch.device("cpu"))


def test_an_inner_stage_is_not_counted_for_the_outer_one(watch, clock):
    with watch.stage("outer"):
        clock.now += 1
        with watch.stage("inner"):
            clock.now += 10
            with watch.stage("innermost"):
                clock.now += 100
        clock.now += 1000
    assert watch.elapsed_s == {"outer": 1001, "inner": 10, "innermost": 100}


def test_stages_add_up_and_what_is_between_them_is_not_counted(watch, clock):
    for seconds in (1, 2):
        clock.now += 50
        with watch.stage("solve"):
            clock.now += seconds
    assert watch.elapsed_s == {"solve": 3}


def test_a_stage_within_itself_is_counted_once(watch, clock):
    with watch.stage("forward"), watch.stage("forward"):
        clock.now += 5
    assert watch.elapsed_s == {"forward": 5}


def test_a_stage_that_fails_is_counted_and_left(watch, clock):
    def fail() -> None:
        with watch.stage("outer"):
            clock.now += 1
            with watch.stage("inner"):
                clock.now += 2
                raise KeyError

    with pytest.raises(KeyError):
        fail()
    with watch.stage("later"):
        clock.now += 4
    assert watch.elapsed_s == {"outer": 1, "inner": 2, "later": 4}
