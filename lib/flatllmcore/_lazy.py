"""Packages whose names are imported when they are first asked for, so that what needs few of them starts at once."""

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any


def attach(
    package: str, offered: Mapping[str, Sequence[str]]
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """Return a package's ``__getattr__``, ``__dir__`` and ``__all__``; its names are ``offered`` by modules."""
    home = {name: module for module, names in offered.items() for name in names}

    def find(name: str) -> Any:
        if name in home:
            return getattr(import_module(home[name], package), name)
        if "." in name or find_spec(f"{package}.{name}") is None:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return import_module(f".{name}", package)

    return find, lambda: sorted(home), sorted(home)
