"""Progress bars with an estimate of the time left, for people who watch a terminal."""

from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

from .processes import is_rank_0


def progress(items: Iterable[Any] | None, doing: str, unit: str, total: float | None = None) -> tqdm:
    """Return ``items`` behind a bar that is wiped when done; only rank 0 draws one, and on a terminal.

    Args:
        items: What to go through, or ``None`` for a bar that is moved by ``update``.
        doing: What the bar says is done.
        unit: What is counted; bytes and characters get prefixes (k, M, ...).
        total: How many units there are, where ``len(items)`` does not say.
    """
    return tqdm(
        items,
        doing,
        total,
        unit=unit,
        unit_scale=unit in ("B", "char"),
        leave=False,
        disable=None if is_rank_0() else True,  # None: by the terminal
        dynamic_ncols=True,
    )
