"""Progress bars with an estimate of the time left, for people who watch a terminal."""

import sys
from collections.abc import Iterable
from contextlib import redirect_stderr
from io import StringIO
from typing import Any

from tqdm import tqdm

from .processes import is_rank_0


def progress(items: Iterable[Any], doing: str, unit: str) -> tqdm:
    """Return ``items`` behind a bar that is wiped when done; only rank 0 draws one, and on a terminal."""
    is_hidden = None if is_rank_0() else True  # None: where there is no terminal
    return tqdm(items, doing, unit=unit, leave=False, disable=is_hidden, dynamic_ncols=True)


def bars_on_terminals_alone() -> redirect_stderr[Any]:
    """Keep out of files the bars that some libraries always draw."""
    return redirect_stderr(sys.stderr if sys.stderr.isatty() else StringIO())
