"""The method's mathematics, one file per step: tensors in, tensors out.

``FlatLLMPruner`` can be imported from here too, as the user document says; it is made of what stands above this folder
and therefore looked up when it is asked for.
"""

from typing import Any

from .rank_allocation import ImportancePreservingRankSelector, RankAllocation

__all__ = ["FlatLLMPruner", "ImportancePreservingRankSelector", "RankAllocation"]


def __getattr__(name: str) -> Any:
    if name != "FlatLLMPruner":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from ..api import FlatLLMPruner

    return FlatLLMPruner
