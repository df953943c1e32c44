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


def test_an_inner_stage_counts_for_itself_alone_unless_the_outer_one_is_whole(watch, clock):
    for is_whole in (False, True):
        with stage("outer", is_whole=is_whole):
            clock.now += 1
            with stage("inner"), stage("innermost"):
                clock.now += 10
            clock.now += 100
    assert watch.elapsed_s == {"outer": 101 + 111, "inner": 0, "innermost": 10}


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
        clock.now += 2
        raise KeyError

    with pytest.raises(KeyError), stage("outer"), stage("inner"):
        fail()
    with stage("later"):
        clock.now += 4
    assert watch.elapsed_s == {"outer": 0, "inner": 2, "later": 4}
