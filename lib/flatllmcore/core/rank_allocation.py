"""Importance-Preserving Rank Selection: from importance scores to a rank and an MLP width per layer."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..utils.files import write_atomically
from ..utils.json_fields import read_dimensions, read_field, read_json_object, read_sequence
from ..utils.layer_utils import ModelDimensions
from .rank_rounding import attention_parameters, query_key_rank, rounded_ranks

MAX_SPARSITY_RATIO = 95
_BINARY_ROUNDING = 1e-9  # 0.29 · 100 is 28.999999999999996 and means 29


@dataclass(frozen=True)
class RankAllocation:
    """How much of each decoder layer stays.

    ``sparsity_ratio`` is the percentage of decoder-layer linear weights asked to be removed; what the
    ranks remove is ``achieved_sparsity_percent``. ``keep`` is the share allotted to V, O and MLP (and
    to Q and K where they are pruned), ``value_rank`` the directions kept per head, ``mlp_width`` the
    channels kept, each one per layer.

    Raises:
        InputError: If an entry is missing or out of the bounds that ``dimensions`` set.
    """

    sparsity_ratio: float
    prune_qk: bool
    rank_multiple: int
    keep: tuple[float, ...]
    value_rank: tuple[int, ...]
    mlp_width: tuple[int, ...]
    dimensions: ModelDimensions
    importance_sha256: str | None = None

    def __post_init__(self) -> None:
        for name, least, most in (
            ("keep", 0, 1),
            ("value_rank", 1, self.dimensions.head_dim),
            ("mlp_width", 1, self.dimensions.intermediate_size),
        ):
            values = getattr(self, name)
            _check_length(name, values, self.dimensions.num_layers)
            for layer_idx, value in enumerate(values):
                if not least <= value <= most or value == 0:
                    accepted = f"{least} to {most}" if least else f"more than 0, at most {most}"
                    raise InputError(f"'{name}' of layer {layer_idx} is {value}; accepted: {accepted}")

    @property
    def query_key_rank(self) -> tuple[int | None, ...]:
        """Rank per head of each layer's Q and K; ``None`` where they stay whole."""
        if not self.prune_qk:
            return (None,) * self.dimensions.num_layers
        return tuple(query_key_rank(self.dimensions, rank) for rank in self.value_rank)

    @property
    def parameters_before(self) -> int:
        return self.dimensions.num_layers * self.dimensions.layer_parameters

    @property
    def parameters_after(self) -> int:
        attention = sum(attention_parameters(self.dimensions, rank, self.prune_qk) for rank in self.value_rank)
        return attention + sum(self.mlp_width) * self.dimensions.width_parameters

    @property
    def achieved_sparsity_percent(self) -> float:
        return 100 * (1 - self.parameters_after / self.parameters_before)

    def to_json(self) -> dict[str, Any]:
        return {
            "sparsity_ratio": self.sparsity_ratio,
            "achieved_sparsity_percent": self.achieved_sparsity_percent,
            "prune_qk": self.prune_qk,
            "rank_multiple": self.rank_multiple,
            "parameters_before": self.parameters_before,
            "parameters_after": self.parameters_after,
            "importance_sha256": self.importance_sha256,
            "dimensions": self.dimensions.to_dict(),
            "keep": list(self.keep),
            "value_rank": list(self.value_rank),
            "mlp_width": list(self.mlp_width),
        }

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "RankAllocation":
        """Return what :meth:`to_json` wrote.

        Raises:
            InputError: Naming the field that is missing, of another type, out of bounds, or at odds with the ranks.
        """
        digest = content.get("importance_sha256")
        allocation = cls(
            sparsity_ratio=read_field(content, "sparsity_ratio", float),
            prune_qk=read_field(content, "prune_qk", bool),
            rank_multiple=read_field(content, "rank_multiple", int),
            keep=read_sequence(content, "keep", float),
            value_rank=read_sequence(content, "value_rank", int),
            mlp_width=read_sequence(content, "mlp_width", int),
            dimensions=read_dimensions(content),
            importance_sha256=None if digest is None else read_field(content, "importance_sha256", str),
        )
        for name in ("parameters_before", "parameters_after"):
            stated, counted = read_field(content, name, int), getattr(allocation, name)
            if stated != counted:
                raise InputError(f"{name!r} is {stated}, but the ranks and widths add up to {counted}")
        return allocation

    def save(self, path: Path) -> None:
        write_atomically(path, (json.dumps(self.to_json(), indent=1) + "\n").encode())

    @classmethod
    def load(cls, path: Path) -> "RankAllocation":
        """Return the allocation a ``ranks_<percent>.json`` holds.

        Raises:
            InputError: Naming the file and the field that cannot be used.
        """
        content = read_json_object(path)
        try:
            return cls.from_json(content)
        except InputError as error:
            raise InputError(f"{path}: {error}") from error


class ImportancePreservingRankSelector:
    """Allocates ranks to the layers of one model in proportion to their importance.

    Args:
        dimensions: Sizes of the model.
        rank_multiple: Ranks and widths are multiples of it, and the parameters removed are within 0.1 % of the target
            or one step of the smaller kind. 1 gives the published floors where Q and K stay whole, which remove what
            they cut off beyond the target. None takes :func:`default_rank_multiple`.
        prune_qk: Whether Q and K are pruned with the share of V, O and MLP.
    """

    def __init__(
        self, dimensions: ModelDimensions, *, rank_multiple: int | None = None, prune_qk: bool = False
    ) -> None:
        self.dimensions = dimensions
        self.rank_multiple = default_rank_multiple(dimensions) if rank_multiple is None else rank_multiple
        self.prune_qk = prune_qk
        largest = min(dimensions.head_dim, dimensions.intermediate_size)
        if not 1 <= self.rank_multiple <= largest:
            raise InputError(f"rank multiple {self.rank_multiple} does not fit this model; accepted: 1 to {largest}")

    def allocate(
        self, scores: Sequence[float], sparsity_ratio: float, importance_sha256: str | None = None
    ) -> RankAllocation:
        """Return the ranks that remove ``sparsity_ratio`` percent of the decoder layers' linear weights.

        Raises:
            InputError: If the scores do not fit the model or the target cannot be met.
        """
        _check_length("scores", scores, self.dimensions.num_layers)
        keep_ratio = 1 - sparsity_ratio / 100
        keep = allocate_keep_ratios(scores, prunable_keep_ratio(self.dimensions, keep_ratio, self.prune_qk))
        # Floors of narrow heads would miss the target where the factors of Q and K are no smaller than these: they stay
        # whole then, and the other parts must make up for it.
        if self.rank_multiple == 1 and not self.prune_qk:
            ranks, widths = published_floors(self.dimensions, keep)
        else:
            ranks, widths = rounded_ranks(self.dimensions, keep, keep_ratio, self.rank_multiple, self.prune_qk)
        return RankAllocation(
            sparsity_ratio=sparsity_ratio,
            prune_qk=self.prune_qk,
            rank_multiple=self.rank_multiple,
            keep=tuple(keep),
            value_rank=tuple(ranks),
            mlp_width=tuple(widths),
            dimensions=self.dimensions,
            importance_sha256=importance_sha256,
        )


def check_sparsity_ratio(percent: int) -> None:
    """Raise InputError unless ``percent`` removed is a target the programs accept."""
    if not 1 <= percent <= MAX_SPARSITY_RATIO:
        raise InputError(
            f"sparsity ratio {percent} is out of range; accepted: 1 to {MAX_SPARSITY_RATIO} percent removed"
        )


def default_rank_multiple(dimensions: ModelDimensions) -> int:
    return 8 if dimensions.head_dim >= 64 else 1


def ranks_from_keep_ratios(
    dimensions: ModelDimensions,
    keep: Sequence[float],
    *,
    prune_qk: bool = False,
    importance_sha256: str | None = None,
) -> RankAllocation:
    """Return the published floors of given keep ratios; their ``sparsity_ratio`` is what the floors remove."""
    _check_length("keep", keep, dimensions.num_layers)
    ranks, widths = published_floors(dimensions, keep)
    allocation = RankAllocation(
        sparsity_ratio=0.0,
        prune_qk=prune_qk,
        rank_multiple=1,
        keep=tuple(keep),
        value_rank=tuple(ranks),
        mlp_width=tuple(widths),
        dimensions=dimensions,
        importance_sha256=importance_sha256,
    )
    return replace(allocation, sparsity_ratio=allocation.achieved_sparsity_percent)


def prunable_keep_ratio(dimensions: ModelDimensions, keep_ratio: float, prune_qk: bool) -> float:
    """Return the share of the pruned projections to keep so that ``keep_ratio`` of all projections stays.

    Raises:
        InputError: If Q and K, which stay whole unless ``prune_qk``, are more than what may stay.
    """
    fixed = 0 if prune_qk else dimensions.qk_parameters
    prunable = dimensions.layer_parameters - fixed
    ratio = (keep_ratio * dimensions.layer_parameters - fixed) / prunable
    if ratio <= 0:
        largest = math.ceil(100 * prunable / dimensions.layer_parameters) - 1
        reason = "nothing would be left" if prune_qk else "Q and K stay whole"
        raise InputError(
            f"removing {100 * (1 - keep_ratio):g} % of this model is impossible because {reason}; "
            f"the largest possible target is {largest} %"
        )
    return ratio


def allocate_keep_ratios(scores: Sequence[float], keep_ratio: float) -> list[float]:
    """Return the share ``w`` of each layer: proportional to its score, at most 1, summing to ``L · keep_ratio``.

    Layers whose proportional share passes 1 are set to 1 and the rest of the budget is shared anew. The most
    important layer goes first, one at a time: the same set as capping all at once, since a capped layer
    only raises the shares of the others, and the budget left can never round to 0.

    Raises:
        InputError: If a score is not positive and finite, or ``keep_ratio`` is outside (0, 1].
    """
    if not 0 < keep_ratio <= 1:
        raise InputError(f"keep ratio {keep_ratio} is out of range; accepted: more than 0, at most 1")
    for layer_idx, score in enumerate(scores):
        if not 0 < score < math.inf:
            raise InputError(f"the score of layer {layer_idx} is {score}; scores must be finite and more than 0")
    keep = [1.0] * len(scores)
    if keep_ratio == 1:
        return keep  # also where equal scores would give 1 less a rounding error
    budget = len(scores) * keep_ratio
    active = sorted(range(len(scores)), key=lambda i: -scores[i])
    total = math.fsum(scores)
    while active and scores[active[0]] * budget > total:
        active = active[1:]
        budget -= 1
        total = math.fsum(scores[i] for i in active)
    for i in active:
        keep[i] = scores[i] * budget / total
    return keep


def published_floors(dimensions: ModelDimensions, keep: Sequence[float]) -> tuple[list[int], list[int]]:
    """Return ⌊w·d⌋ and ⌊w·F⌋ of each layer, at least 1."""
    ranks = [max(1, math.floor(w * dimensions.head_dim + _BINARY_ROUNDING)) for w in keep]
    widths = [max(1, math.floor(w * dimensions.intermediate_size + _BINARY_ROUNDING)) for w in keep]
    return ranks, widths


def _check_length(name: str, values: Sequence[float], num_layers: int) -> None:
    if len(values) != num_layers:
        raise InputError(f"'{name}' has {len(values)} entries; the model has {num_layers} layers")
