"""The method's mathematics, one file per step: tensors in, tensors out."""

from typing import TYPE_CHECKING

from .._lazy import attach

if TYPE_CHECKING:  # for editors
    from ..api import FlatLLMPruner
    from .rank_allocation import ImportancePreservingRankSelector, RankAllocation

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        ".rank_allocation": ("ImportancePreservingRankSelector", "RankAllocation"),
        "..api": ("FlatLLMPruner",),  # stands above this folder, but the user document imports it from here
    },
)
