"""Ranks and MLP widths in steps that hardware likes, at the exact parameter budget."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import InputError
from ..utils.dimensions import Kept, ModelDimensions

RELATIVE_TOLERANCE = 0.001  # parameters removed, against the target
WIDE_STEP = 64  # MLP channels that matrix units like best
WIDE_STEP_SHARE = 0.005  # of a layer's parameters: what a wide step may cost


def rounded_layers(
    dimensions: ModelDimensions, keep: Sequence[float], keep_ratio: float, rank_step: int, prune_qk: bool
) -> list[Kept]:
    """Return layers whose ranks and widths are whole steps and which keep ``keep_ratio`` of the linear weights.

    Widths move in steps of 64 channels where that is cheap, else of ``rank_step``. Layers with ``w = 1``
    stay whole; the others keep at least one step and at most as many as fit. The parameters removed are
    within 0.1 % of the target, or one step of the smaller kind where that is more; InputError if no steps come there.
    """
    steps = _Steps(dimensions, rank_step, _width_step(dimensions, rank_step), prune_qk)
    pruned = [w for w in keep if w < 1]
    layer = dimensions.layer_parameters
    total, whole = len(keep) * layer, (len(keep) - len(pruned)) * layer
    smallest_step = min(rank_step * dimensions.rank_parameters, steps.width_parameters)
    tolerance = max(RELATIVE_TOLERANCE * (1 - keep_ratio) * total, smallest_step)
    fitting = steps.fit(pruned, keep_ratio * total - whole, tolerance)
    if fitting is None:
        kept = [len(pruned) * steps.parameters(*n) for n in ((steps.most_ranks, steps.most_widths), (1, 1))]
        least, most = (100 * (1 - (whole + parameters) / total) for parameters in kept)
        raise InputError(
            f"ranks in steps of {steps.rank} and MLP widths in steps of {steps.width} cannot remove "
            f"{100 * (1 - keep_ratio):g} % of this model; they can remove {least:.1f} to {most:.1f} %, "
            "and a smaller rank multiple more"
        )
    whole_layer = Kept(1.0, dimensions.head_dim, dimensions.intermediate_size)
    return [fitting.pop(0) if w < 1 else whole_layer for w in keep]


def largest_remainder(ideal: Sequence[float], total: int, most: int) -> list[int]:
    """Return integers in ``1..most`` that sum to ``total`` and are as nearly proportional to ``ideal`` as can be."""
    scale = total / math.fsum(ideal) if ideal else 1.0
    shares = [share * scale for share in ideal]
    steps = [min(max(math.floor(share), 1), most) for share in shares]
    missing = total - sum(steps)
    direction = 1 if missing > 0 else -1
    for _ in range(abs(missing)):
        movable = [i for i, n in enumerate(steps) if 1 <= n + direction <= most]
        steps[max(movable, key=lambda i: direction * (shares[i] - steps[i]))] += direction
    return steps


def _width_step(dimensions: ModelDimensions, rank_step: int) -> int:
    is_wide_step_cheap = WIDE_STEP * dimensions.width_parameters < WIDE_STEP_SHARE * dimensions.layer_parameters
    return WIDE_STEP if WIDE_STEP % rank_step == 0 and is_wide_step_cheap else rank_step


@dataclass(frozen=True)
class _Steps:
    """The sizes of one step of rank and of MLP width, and what numbers of steps cost."""

    dimensions: ModelDimensions
    rank: int
    width: int
    prune_qk: bool

    @property
    def most_ranks(self) -> int:
        return self.dimensions.head_dim // self.rank

    @property
    def most_widths(self) -> int:
        return self.dimensions.intermediate_size // self.width

    @property
    def width_parameters(self) -> int:
        return self.width * self.dimensions.width_parameters

    def parameters(self, rank_steps: int, width_steps: int) -> int:
        return self.dimensions.parameters_of(self.kept(1, rank_steps, width_steps))

    def kept(self, keep: float, rank_steps: int, width_steps: int) -> Kept:
        rank = rank_steps * self.rank
        query_key_rank = self.dimensions.query_key_rank(rank) if self.prune_qk else None
        return Kept(keep, rank, width_steps * self.width, query_key_rank)

    def fit(self, keep: Sequence[float], budget: float, tolerance: float) -> list[Kept] | None:
        """Return layers that spend the budget: rank steps as near the ideal as leaves what widths can take up."""
        ideal_ranks = [w * self.dimensions.head_dim / self.rank for w in keep]
        totals = range(len(keep), len(keep) * self.most_ranks + 1)
        for rank_total in sorted(totals, key=lambda n: abs(n - math.fsum(ideal_ranks))):
            rank_steps = largest_remainder(ideal_ranks, rank_total, self.most_ranks)
            rest = budget - sum(self.parameters(n, 0) for n in rank_steps)
            width_total = min(max(round(rest / self.width_parameters), len(keep)), len(keep) * self.most_widths)
            if abs(rest - width_total * self.width_parameters) <= tolerance:
                width_steps = largest_remainder(keep, width_total, self.most_widths)
                return [self.kept(*sizes) for sizes in zip(keep, rank_steps, width_steps, strict=True)]
        return None
