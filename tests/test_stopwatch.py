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
    monkeypatch.setattr(stopwatch, "time", clock := Clock())
    return clock


def test_stages_add_up_each_for_itself_alone_unless_the_outer_one_is_whole(clock):
    with Stopwatch(torch.device("cpu")).running() as watch:
        for is_whole in (False, True):
            clock.now += 5000
            with stage("outer", is_whole=is_whole):
                clock.now += 1
                with stage("inner"), stage("innermost"):
                    clock.now += 10
                clock.now += 100
        with Stopwatch(watch.device).running() as other, stage("inner"):
            clock.now += 700
    assert watch.elapsed_s == {"outer": 101 + 111, "inner": 0, "innermost": 10}
    assert other.elapsed_s == {"inner": 700}
