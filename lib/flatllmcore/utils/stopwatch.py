"""Where the time of a run goes: code names its stages, and whoever wants to know runs it under a stopwatch."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

from .devices import synchronize

_running: ContextVar["Stopwatch | None"] = ContextVar("running_stopwatch", default=None)


class Stopwatch:
    """Adds up exclusive wall-clock seconds per named stage; an inner stage's time is not its outer's."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stage: str | None = None
        self._since = 0.0
        self.restart()

    def restart(self) -> None:
        """Begin to count anew; between stages."""
        self.elapsed_s: dict[str, float] = defaultdict(float)
        self.started = time.perf_counter()

    @contextmanager
    def running(self) -> Iterator["Stopwatch"]:
        """Count the stages named inside the block; a stopwatch that runs outside of it stands still meanwhile."""
        token = _running.set(self)
        try:
            yield self
        finally:
            _running.reset(token)

    def switch(self, stage: str | None) -> str | None:
        """Begin a stage, or none, when the device work queued is done; return the one that it ends."""
        synchronize(self.device)
        now, ended = time.perf_counter(), self._stage
        if ended is not None:
            self.elapsed_s[ended] += now - self._since
        self._stage, self._since = stage, now
        return ended


@contextmanager
def stage(name: str, *, is_whole: bool = False) -> Iterator[None]:
    """Count the block for ``name`` on the stopwatch that runs, if one does; stages inside a whole one count for it."""
    stopwatch = _running.get()
    if stopwatch is None:
        yield
        return
    outer, token = stopwatch.switch(name), _running.set(None if is_whole else stopwatch)
    try:
        yield
    finally:
        _running.reset(token)
        stopwatch.switch(outer)
