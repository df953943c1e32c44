"""Markdown: tables, code, and text from anywhere that must be read as it stands."""

import re
from collections.abc import Iterable, Sequence

NOT_RUN = "not run"
NOT_PUBLISHED = NOT_THERE = "–"
_SPECIAL = re.compile(r"[\\`*\[\]<>|&~#]|(?<![^\W_])_|_(?![^\W_])")  # an underscore inside a word is only itself


class Markdown(str):
    """Text that is Markdown already, and goes into a table as it is."""


def escaped(text: str) -> Markdown:
    """Return one line of Markdown that reads as ``text``, whatever is in it; white space becomes single spaces."""
    return Markdown(_SPECIAL.sub(r"\\\g<0>", " ".join(text.split())))


def code(text: str) -> Markdown:
    """Return ``text`` as code within a line."""
    line = " ".join(text.split())
    ticks = "`" * _longer_than_any("`", line)
    space = " " if "`" in line else ""
    return Markdown(f"{ticks}{space}{line}{space}{ticks}")


def code_block(lines: Iterable[str]) -> Markdown:
    """Return shell commands, one per line, as a block."""
    text = "\n".join(lines)
    fence = "`" * max(3, _longer_than_any("`", text))
    return Markdown(f"{fence}bash\n{text}\n{fence}\n")


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table whose first column is aligned left and the others right, padded so that it reads as plain text.

    Raises:
        ValueError: If a row has more or fewer cells than the header.
    """
    cells = [[cell if isinstance(cell, Markdown) else escaped(cell) for cell in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    rule = ["-" * widths[0], *(f"{'-' * (width - 1)}:" for width in widths[1:])]
    head, *body = (_padded(row, widths) for row in cells)
    return "".join(f"| {' | '.join(row)} |\n" for row in (head, rule, *body))


def _padded(row: Sequence[str], widths: Sequence[int]) -> list[str]:
    return [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]


def _longer_than_any(character: str, text: str) -> int:
    return 1 + max(map(len, re.findall(f"{re.escape(character)}+", text)), default=0)
