"""The compression methods, by the name that ``--prune_method`` and ``FlatLLMConfig.method`` take.

A method is data about what is looked at and what is solved; ``engine/protocols.py`` says how the engine asks. A further
one is a file here and an entry below.
"""

from collections import UserDict
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..engine.protocols import Method


class _Methods(UserDict[str, Any]):
    """Methods by name; of one that a file here has, its class is imported when the method is first asked for."""

    def __getitem__(self, name: str) -> "Method":
        found = super().__getitem__(name)
        if isinstance(found, str):
            module, _, kind = found.rpartition(".")
            self[name] = found = getattr(import_module(module, __name__), kind)()
        return found


METHODS = _Methods({"flatllm": ".flatllm.FlatLLM", "flatllm+": ".flatllm_plus.FlatLLMPlus"})
