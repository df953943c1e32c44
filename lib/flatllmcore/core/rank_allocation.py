"""Importance-Preserving Rank Selection: from importance scores to a rank and an MLP width per layer."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from ..errors import InputError
from ..utils.dimensions import Kept, ModelDimensions, check_length
from .rank_rounding import rounded_layers

_BINARY_ROUNDING = 1e-9  # 0.29 · 100 is 28.999999999999996 and means 29


@dataclass(frozen=True)
class RankAllocation:
    """What each decoder layer of a model keeps.

    ``keep_ratio`` is the share of the decoder layers' linear weights asked to stay, ``dimensions`` are those of the
    dense model, and ``importance_sha256`` is the digest of the file of scores that this was made from.

    Raises:
        InputError: If there is not one entry per layer, or one is out of the bounds that ``dimensions`` set.
    """

    keep_ratio: float
    prune_qk: bool
    rank_multiple: int
    layers: tuple[Kept, ...]
    dimensions: ModelDimensions
    importance_sha256: str | None = None

    def __post_init__(self) -> None:
        sizes = self.dimensions
        check_length("layers", self.layers, sizes.num_layers)
        for index, kept in enumerate(self.layers):
            for name, most in (("value_rank", sizes.head_dim), ("mlp_width", sizes.intermediate_size)):
                if not 1 <= getattr(kept, name) <= most:
                    raise InputError(f"{name!r} of layer {index} is {getattr(kept, name)}; accepted: 1 to {most}")
            if not 0 < kept.keep <= 1:
                raise InputError(f"'keep' of layer {index} is {kept.keep}; accepted: more than 0, at most 1")

    @classmethod
    def of_layers(cls, dimensions: ModelDimensions, layers: Iterable[Kept], *, prune_qk: bool) -> "RankAllocation":
        """Return an allocation of given layers, which asks for what they keep."""
        made = cls(1.0, prune_qk, 1, tuple(layers), dimensions)
        return replace(made, keep_ratio=made.parameters_after / made.parameters_before)

    @property
    def parameters_before(self) -> int:
        """Linear weights of the dense model's decoder layers."""
        return self.dimensions.num_layers * self.dimensions.layer_parameters

    @property
    def parameters_after(self) -> int:
        """Linear weights that stay."""
        return sum(map(self.dimensions.parameters_of, self.layers))

    @property
    def sparsity_percent(self) -> float:
        """Percent of the linear weights asked to be removed."""
        return round(100 * (1 - self.keep_ratio), 9)

    @property
    def achieved_sparsity_percent(self) -> float:
        """Percent of the linear weights that is removed."""
        return 100 * (1 - self.parameters_after / self.parameters_before)


class ImportancePreservingRankSelector:
    """Allocates ranks to the layers of one model in proportion to their importance.

    Ranks and widths are multiples of ``rank_multiple``, and the parameters removed are within 0.1 % of the target or
    one step of the smaller kind. 1 gives the published floors where Q and K stay whole, which remove what they cut off
    beyond the target. None takes 8 where heads are 64 wide or more, else 1. An InputError names one that does not fit.
    """

    def __init__(
        self, dimensions: ModelDimensions, *, rank_multiple: int | None = None, prune_qk: bool = False
    ) -> None:
        self.dimensions, self.prune_qk = dimensions, prune_qk
        default = 8 if dimensions.head_dim >= 64 else 1
        self.rank_multiple = default if rank_multiple is None else rank_multiple
        largest = min(dimensions.head_dim, dimensions.intermediate_size)
        if not 1 <= self.rank_multiple <= largest:
            raise InputError(f"rank multiple {self.rank_multiple} does not fit this model; accepted: 1 to {largest}")

    def prunable_keep_ratio(self, keep_ratio: float) -> float:
        """Return the share of the pruned projections to keep so that ``keep_ratio`` of all projections stays.

        An InputError names the largest target where Q and K, whole unless they are pruned, are more than may stay.
        """
        total = self.dimensions.layer_parameters
        fixed = 0 if self.prune_qk else self.dimensions.qk_parameters
        ratio = (keep_ratio * total - fixed) / (total - fixed)
        if ratio <= 0:
            largest = math.ceil(100 * (total - fixed) / total) - 1
            reason = "nothing would be left" if self.prune_qk else "Q and K stay whole"
            raise InputError(
                f"removing {100 * (1 - keep_ratio):g} % of this model is impossible because {reason}; "
                f"the largest possible target is {largest} %"
            )
        return ratio

    def allocate(self, scores: Sequence[float], keep_ratio: float) -> RankAllocation:
        """Return the ranks that keep ``keep_ratio`` of the linear weights; InputError if there are none."""
        check_length("scores", scores, self.dimensions.num_layers)
        keep = allocate_keep_ratios(scores, self.prunable_keep_ratio(keep_ratio))
        # Floors of narrow heads would miss the target where the factors of Q and K are no smaller than these: they stay
        # whole then, and the other parts must make up for it.
        if self.rank_multiple == 1 and not self.prune_qk:
            layers = [self.floored(w) for w in keep]
        else:
            layers = rounded_layers(self.dimensions, keep, keep_ratio, self.rank_multiple, self.prune_qk)
        return RankAllocation(keep_ratio, self.prune_qk, self.rank_multiple, tuple(layers), self.dimensions)

    def floored(self, keep: float, keep_of_values: float | None = None) -> Kept:
        """Return a layer's published floors, ⌊w·d⌋ and ⌊w·F⌋, at least 1; ``keep_of_values`` may be another w for d."""
        sizes = self.dimensions
        rank = _floor((keep if keep_of_values is None else keep_of_values) * sizes.head_dim)
        query_key_rank = sizes.query_key_rank(rank) if self.prune_qk else None
        return Kept(keep, rank, _floor(keep * sizes.intermediate_size), query_key_rank)


def allocate_keep_ratios(scores: Sequence[float], keep_ratio: float) -> list[float]:
    """Return the share ``w`` of each layer: proportional to its score, at most 1, summing to ``L · keep_ratio``.

    Layers whose proportional share passes 1 are set to 1 and the rest of the budget is shared anew. The most
    important layer goes first, one at a time: the same set as capping all at once, since a capped layer
    only raises the shares of the others, and the budget left can never round to 0. InputError for unusable numbers.
    """
    if not 0 < keep_ratio <= 1:
        raise InputError(f"keep ratio {keep_ratio} is out of range; accepted: more than 0, at most 1")
    for index, score in enumerate(scores):
        if not 0 < score < math.inf:
            raise InputError(f"the score of layer {index} is {score}; scores must be finite and more than 0")
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


def _floor(size: float) -> int:
    return max(1, math.floor(size + _BINARY_ROUNDING))
