"""Importance-Preserving Rank Selection: from importance scores to a rank and an MLP width per layer."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from ..errors import InputError
from ..utils.dimensions import Kept, ModelDimensions, check_length
from ..utils.names import PER_LAYER, STOCK
from .curve_allocation import MLP, PAIRS, VALUES, Curves, ideal_without, removed_by_curves
from .rank_rounding import WIDE_STEP, Ideal, allowed_error, rank_step_for, rounded_layers, width_step_for

_BINARY_ROUNDING = 1e-9  # 0.29 · 100 is 28.999999999999996 and means 29


@dataclass(frozen=True)
class RankAllocation:
    """What each decoder layer of a model keeps.

    ``sparsity_ratio`` is the percentage of the decoder layers' linear weights asked to be removed, ``dimensions`` are
    those of the dense model. ``importance_sha256`` is the digest of the file of scores that this was made from,
    ``fingerprint`` what that says of the model, ``importance_method`` what of it counted, where these are known. In the
    ``shape`` of a stock model layers keep the same, of their MLP alone. An InputError names an entry out of its bounds.
    """

    sparsity_ratio: float
    prune_qk: bool
    rank_multiple: int
    dimensions: ModelDimensions
    layers: tuple[Kept, ...]
    importance_sha256: str | None = None
    fingerprint: str | None = None
    importance_method: str | None = None
    shape: str = PER_LAYER

    def __post_init__(self) -> None:
        largest = {"keep": 1, "value_rank": self.dimensions.head_dim, "mlp_width": self.dimensions.intermediate_size}
        largest["query_key_pairs"] = self.dimensions.head_dim // 2
        check_length("layers", self.layers, self.dimensions.num_layers)
        for name, most in largest.items():
            for index, value in enumerate(self.per_layer(name)):
                if value is not None and not 0 < value <= most:
                    raise InputError(f"{name!r} of layer {index} is {value}; accepted: more than 0, at most {most}")

    def check_matches(self, dimensions: ModelDimensions) -> None:
        """Refuse a model of other sizes."""
        if differences := self.dimensions.differences_from(dimensions):
            raise InputError(f"the ranks belong to another model: {differences}")

    def per_layer(self, name: str) -> list[Any]:
        """Return one of the sizes of :class:`Kept`, layer by layer."""
        return [getattr(kept, name) for kept in self.layers]

    @property
    def parameters_before(self) -> int:
        """Linear weights of the dense model's decoder layers."""
        return self.dimensions.num_layers * self.dimensions.layer_parameters

    @property
    def parameters_after(self) -> int:
        """Linear weights that stay."""
        return sum(map(self.dimensions.parameters_of, self.layers))

    @property
    def achieved_sparsity_percent(self) -> float:
        """Percent of the linear weights that is removed."""
        return 100 * (1 - self.parameters_after / self.parameters_before)

    @property
    def input_divisor(self) -> int:
        """What divides the inputs of all linear layers, as groups of quantised weights are to."""
        inputs = (
            size for kept in self.layers for size in (self.dimensions.num_heads * kept.value_rank, kept.mlp_width)
        )
        return math.gcd(self.dimensions.hidden_size, *inputs)


class ImportancePreservingRankSelector:
    """Allocates ranks to the layers of one model in proportion to their importance.

    Ranks and widths are multiples of ``rank_multiple``, and the parameters removed are within 0.1 % of the target or
    one step of the smaller kind. 1 gives the published floors where Q and K stay whole, which remove what they cut off
    beyond the target. None takes 8 where heads are 64 wide or more, else 1. With a ``width_multiple`` widths are
    multiples of that, and so are heads × rank as far as 32. An InputError names a multiple that does not fit. Of the
    stock ``shape`` there is one allocation, whatever the importance, and its width multiple is 64 for ``None``.
    """

    def __init__(
        self,
        dimensions: ModelDimensions,
        *,
        rank_multiple: int | None = None,
        width_multiple: int | None = None,
        prune_qk: bool = False,
        shape: str = PER_LAYER,
    ) -> None:
        self.dimensions, self.prune_qk, self.is_stock = dimensions, prune_qk, shape == STOCK
        if self.is_stock:  # no value head loses a direction
            rank_multiple, width_multiple = dimensions.head_dim, width_multiple or WIDE_STEP
        default = 8 if dimensions.head_dim >= 64 else 1
        self.rank_multiple = self._fitting("rank", default if rank_multiple is None else rank_multiple)
        self.is_floored = self.rank_multiple == 1 and not prune_qk and width_multiple in (None, 1)
        if width_multiple is None:
            width_multiple = width_step_for(dimensions, self.rank_multiple)
        else:
            self.rank_multiple = self._fitting("rank", rank_step_for(dimensions, self.rank_multiple, width_multiple))
        self.width_multiple = self._fitting("width", width_multiple)

    def prunable_keep_ratio(self, keep_ratio: float) -> float:
        """Return the share of the pruned projections to keep so that ``keep_ratio`` of all projections stays."""
        total = self.dimensions.layer_parameters
        fixed = 0 if self.prune_qk else self.dimensions.qk_parameters
        if self.is_stock:
            fixed = total - self.dimensions.intermediate_size * self.dimensions.width_parameters
        return (keep_ratio * total - fixed) / (total - fixed)

    def check_target(self, keep_ratio: float, curves: Sequence[Curves] | None = None) -> None:
        """Refuse, naming the largest target, what no scores could give, or where given no curves that go so far.

        Layers keep one step of each size.
        """
        sizes, multiples = self.dimensions, (self.rank_multiple, self.width_multiple)
        smallest = sizes.kept(1.0, *multiples, self.prune_qk)
        removable = sizes.num_layers * (sizes.layer_parameters - sizes.parameters_of(smallest))
        ends = {kind: sum(of[kind][-1][0] for of in curves or () if kind in of) for kind in (VALUES, MLP, PAIRS)}
        if curves is not None:
            removable = int(min(removable, sum(ends.values()) if self.prune_qk else ends[VALUES] + ends[MLP]))

        def is_possible(share: float) -> bool:
            removed = share * sizes.num_layers * sizes.layer_parameters
            most = removable + allowed_error(sizes, removed, *multiples)
            return removed <= most and self.prunable_keep_ratio(1 - share) > 0

        if not is_possible(1 - keep_ratio):
            largest = max(percent for percent in range(100) if is_possible(percent / 100))
            if self.is_stock:
                more = "; the stock shape takes all from MLPs: more with --shape per-layer, or a narrower multiple"
            elif not self.prune_qk and (curves is None or ends[PAIRS] > 0):
                more = "; more with Q and K pruned: --prune_qk, or preserve_qk_layers=False"
            else:
                more = "; more may go by the published method with Q and K pruned" if curves is not None else ""
            problem = f"removing {100 * (1 - keep_ratio):g} % of this model is impossible"
            raise InputError(f"{problem}; the largest possible target is {largest} %{more}")

    def allocate(
        self, scores: Sequence[float], keep_ratio: float, curves: Sequence[Curves] | None = None
    ) -> RankAllocation:
        """Return what keeps ``keep_ratio`` of the linear weights, by curves of damage where given, else by the scores.

        By curves Q and K lose rotary pairs where they are pruned, and by scores leave two factors. InputError if there
        is no such allocation.
        """
        check_length("scores", scores, self.dimensions.num_layers)
        self.check_target(keep_ratio, curves)
        percent, multiples = round(100 * (1 - keep_ratio), 9), (self.rank_multiple, self.width_multiple)
        sizes = self.dimensions
        whole = Kept(1.0, sizes.head_dim, sizes.intermediate_size)
        if curves is not None and keep_ratio == 1:  # of which steps that do not divide the sizes would take away
            layers = [whole] * sizes.num_layers
        elif curves is not None:
            used = [{kind: curve for kind, curve in of.items() if self.prune_qk or kind != PAIRS} for of in curves]
            taken = removed_by_curves(used, (1 - keep_ratio) * sizes.num_layers * sizes.layer_parameters)
            ideals = [ideal_without(sizes, of_layer, self.rank_multiple) for of_layer in taken]
            layers = rounded_layers(sizes, ideals, keep_ratio, *multiples)
        else:
            keep = allocate_keep_ratios(scores, self.prunable_keep_ratio(keep_ratio))
            floors = self.floored(keep)
            # Floors of narrow heads miss the target where they would be 0, or where the factors of Q and K are no
            # smaller than these, which stay whole then: the other parts must make up for it.
            if self.is_floored and floors.sparsity_ratio >= percent:
                return replace(floors, sparsity_ratio=percent)
            ideals = [
                Ideal(w * sizes.head_dim, w, partial(sizes.kept, w, prune_qk=self.prune_qk)) for w in keep if w < 1
            ]
            rounded = iter(rounded_layers(sizes, ideals, keep_ratio, *multiples))
            layers = [next(rounded) if w < 1 else whole for w in keep]
        return RankAllocation(percent, self.prune_qk, self.rank_multiple, sizes, tuple(layers))

    def stock(self, keep_ratio: float) -> RankAllocation:
        """Return the stock shape that keeps ``keep_ratio`` of the linear weights, as nearly as one width step allows.

        InputError if so much cannot be removed from the MLPs, or so little.
        """
        self.check_target(keep_ratio)
        sizes, step = self.dimensions, self.width_multiple
        ideal = self.prunable_keep_ratio(keep_ratio) * sizes.intermediate_size
        stepped = max(1, round(ideal / step)) * step
        width = min(sizes.intermediate_size, stepped, key=lambda one: abs(one - ideal))
        percent = round(100 * (1 - keep_ratio), 9)
        if width == sizes.intermediate_size and percent:
            raise InputError(f"MLP widths in steps of {step} cannot remove {percent:g} %; give a smaller multiple")
        kept = Kept(1.0, sizes.head_dim, width)
        layer = replace(kept, keep=sizes.parameters_of(kept) / sizes.layer_parameters)
        layers = (layer,) * sizes.num_layers
        return RankAllocation(percent, False, sizes.head_dim, sizes, layers, shape=STOCK)

    def floored(self, keep: Sequence[float], keep_of_values: Sequence[float] | None = None) -> RankAllocation:
        """Return ⌊w·d⌋ and ⌊w·F⌋, at least 1, of given shares, or of others for d; they ask for what they remove."""
        sizes = self.dimensions
        if not all(map(math.isfinite, keep)):
            raise InputError(f"the shares to keep are {list(keep)}; accepted: more than 0, at most 1")
        layers = tuple(
            sizes.kept(w, _floor(of_values * sizes.head_dim), _floor(w * sizes.intermediate_size), self.prune_qk)
            for w, of_values in zip(keep, keep_of_values or keep, strict=True)
        )
        made = RankAllocation(0.0, self.prune_qk, 1, sizes, layers)
        return replace(made, sparsity_ratio=round(made.achieved_sparsity_percent, 9))

    def _fitting(self, kind: str, multiple: int) -> int:
        largest = self.dimensions.head_dim if kind == "rank" else self.dimensions.intermediate_size
        if not 1 <= multiple <= largest:
            raise InputError(f"{kind} multiple {multiple} does not fit this model; accepted: 1 to {largest}")
        return multiple


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
    _, exponent = math.frexp(max(scores, default=1.0))
    scores = [math.ldexp(score, -exponent) for score in scores]  # exact, and no sum of them overflows
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
