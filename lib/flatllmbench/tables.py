"""Markdown tables."""

from collections.abc import Iterable, Sequence
from typing import Any

NOT_RUN = "not run"
NOT_THERE = "–"


def figure(value: Any, form: str = ".2f", otherwise: str = NOT_RUN) -> str:
    """Return a number as a cell has it, or what stands there for None."""
    return otherwise if value is None else format(value, form)


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table whose first column is aligned left and the others right, padded so that it reads as plain text.

    Raises:
        ValueError: If a row has more or fewer cells than the header.
    """
    cells = [[" ".join(cell.split()).replace("|", r"\|") for cell in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    padded = ([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in (cells[0], rule, *cells[1:]))
    return "".join(f"| {' | '.join(row)} |\n" for row in padded)
