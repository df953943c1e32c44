"""Markdown tables read back, by other means than those that wrote them."""

import re


def cells_of(line: str) -> list[str]:
    """Return the cells of a Markdown table's row as they read: without padding, escapes and ticks."""
    parts = re.split(r"(?<!\\)\|", line.strip())[1:-1]
    return [re.sub(r"\\(.)", r"\1", part.strip()).strip("`") for part in parts]


def tables(text: str) -> list[list[list[str]]]:
    """Return the rows of every table in a Markdown text, headers first."""
    found: list[list[list[str]]] = [[]]
    for line in text.splitlines():
        if line.startswith("|"):
            found[-1].append(cells_of(line))
        elif found[-1]:
            found.append([])
    return [[table[0], *table[2:]] for table in found if table]
