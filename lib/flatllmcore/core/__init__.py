"""The method's mathematics, one file per step: tensors in, tensors out."""

from typing import Any

from .rank_allocation import ImportancePreservingRankSelector, RankAllocation

__all__ = ["ImportancePreservingRankSelector", "RankAllocation"]


def __getattr__(name: str) -> Any:  # the user document imports FlatLLMPruner from here, which stands above this folder
    if name != "FlatLLMPruner":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from ..api import FlatLLMPruner

    return FlatLLMPruner
