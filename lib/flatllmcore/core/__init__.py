"""The method, one file per step, and the two classes that run it."""

from .pruner import FlatLLMPruner
from .rank_allocation import ImportancePreservingRankSelector, RankAllocation

__all__ = ["FlatLLMPruner", "ImportancePreservingRankSelector", "RankAllocation"]
