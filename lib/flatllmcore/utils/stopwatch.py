"""Where the time of a run goes: code names its stages, and whoever wants to know runs it under a stopwatch."""

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar

import torch

from .devices import synchronize

_running: ContextVar["Stopwatch | None"] = ContextVar("running_stopwatch", default=None)


class Stopwatch:
    """Adds up exclusive wall-clock seconds per named stage; an inner stage's time is not its outer's."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.elapsed_s: dict[str, float] = {}
        self._stages: list[tuple[str, bool]] = []  # name, and whether stages inside count for it
        self._since = 0.0

    @contextmanager
    def running(self) -> Iterator["Stopwatch"]:
        """Count the stages named inside the block; a stopwatch that runs outside of it stands still meanwhile."""
        token = _running.set(self)
        try:
            yield self
        finally:
            _running.reset(token)

    @contextmanager
    def counting(self, name: str, is_whole: bool) -> Iterator[None]:
        """Count the time inside the block, with the device work queued there, as :func:`stage` says."""
        self._settle()
        is_inside_whole = bool(self._stages) and self._stages[-1][1]
        self._stages.append(self._stages[-1] if is_inside_whole else (name, is_whole))
        try:
            yield
        finally:
            self._settle()
            self._stages.pop()

    def _settle(self) -> None:
        synchronize(self.device)
        now = time.perf_counter()
        if self._stages:
            name, _ = self._stages[-1]
            self.elapsed_s[name] = self.elapsed_s.get(name, 0.0) + now - self._since
        self._since = now


def stage(name: str, *, is_whole: bool = False) -> AbstractContextManager[None]:
    """Return a block whose time counts for ``name`` on the stopwatch that runs, if one does.

    The stages inside one that is whole count for it; else each counts for itself alone.
    """
    stopwatch = _running.get()
    return nullcontext() if stopwatch is None else stopwatch.counting(name, is_whole)
