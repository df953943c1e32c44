"""Where the time of a run goes, stage by stage."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..utils.devices import synchronize


class Stopwatch:
    """Adds up exclusive wall-clock seconds per named stage; an inner stage's time is not its outer's."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.elapsed_s: dict[str, float] = {}
        self._running: list[str] = []
        self._since = 0.0

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count the time inside the block for ``name``, waiting for queued device work at both ends."""
        self._settle()
        self._running.append(name)
        try:
            yield
        finally:
            self._settle()
            self._running.pop()

    def _settle(self) -> None:
        synchronize(self.device)
        now = time.perf_counter()
        if self._running:
            name = self._running[-1]
            self.elapsed_s[name] = self.elapsed_s.get(name, 0.0) + now - self._since
        self._since = now
