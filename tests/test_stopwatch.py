"""Time per stage, against a clock that the test sets."""

import pytest
import torch

from flatllmcore.utils import stopwatch
from flatllmcore.utils.stopwatch import Stopwatch, stage


class Clock:
    """Stands for the module ``time``."""

    now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(stopwatch, "time", clock)
    return clock


@pytest.fixture
def watch(clock):
    with Stopwatch(torch.device("cpu")).running() as running:
        yield running


def test_an_inner_stage_is_not_counted_for_the_outer_one(watch, clock):
    with stage("outer"):
        clock.now += 1
        with stage("inner"):
            clock.now += 10
            with stage("innermost"):
                clock.now += 100
        clock.now += 1000
    assert watch.elapsed_s == {"outer": 1001, "inner": 10, "innermost": 100}


def test_a_whole_stage_counts_what_is_inside(watch, clock):
    with stage("perplexity", is_whole=True):
        clock.now += 1
        with stage("forward"), stage("read"):
            clock.now += 10
    with stage("forward"):
        clock.now += 100
    assert watch.elapsed_s == {"perplexity": 11, "forward": 100}


def test_stages_add_up_and_what_is_between_or_beside_them_is_not_counted(watch, clock):
    for seconds in (1, 2):
        clock.now += 50
        with stage("solve"), stage("solve"):
            clock.now += seconds
    with Stopwatch(watch.device).running() as other, stage("solve"):
        clock.now += 70
    assert watch.elapsed_s == {"solve": 3}
    assert other.elapsed_s == {"solve": 70}


def test_a_stage_that_fails_is_counted_and_left(watch, clock):
    def fail() -> None:
        with stage("outer"):
            clock.now += 1
            with stage("inner"):
                clock.now += 2
                raise KeyError

    with pytest.raises(KeyError):
        fail()
    with stage("later"):
        clock.now += 4
    assert watch.elapsed_s == {"outer": 1, "inner": 2, "later": 4}
