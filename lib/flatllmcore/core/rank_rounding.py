"""Ranks and MLP widths in steps that hardware likes, at the exact parameter budget."""

import math
from collections.abc import Sequence

from ..errors import InputError
from ..utils.dimensions import Kept, ModelDimensions

RELATIVE_TOLERANCE = 0.001  # parameters removed, against the target
WIDE_STEP = 64  # MLP channels that matrix units like best
WIDE_STEP_SHARE = 0.005  # of a layer's parameters: what a wide step may cost


def rounded_layers(
    dimensions: ModelDimensions, keep: Sequence[float], keep_ratio: float, rank_step: int, prune_qk: bool
) -> list[Kept]:
    """Return layers whose ranks and MLP widths are whole steps and which keep ``keep_ratio`` of the linear weights.

    Widths move in steps of 64 channels where that is cheap, else of ``rank_step``. Layers with ``w = 1``
    stay whole; the others keep at least one step and at most as many as fit. The parameters removed are
    within 0.1 % of the target, or one step of the smaller kind where that is more; InputError if no steps come there.
    """
    width_step = width_step_for(dimensions, rank_step)
    most_ranks, most_widths = dimensions.head_dim // rank_step, dimensions.intermediate_size // width_step
    width_cost = width_step * dimensions.width_parameters
    rank_costs = [
        dimensions.parameters_of(dimensions.kept(1.0, n * rank_step, 0, prune_qk)) for n in range(most_ranks + 1)
    ]
    whole_layer = Kept(1.0, dimensions.head_dim, dimensions.intermediate_size)
    pruned = [w for w in keep if w < 1]
    total = len(keep) * dimensions.layer_parameters
    whole = total - len(pruned) * dimensions.layer_parameters
    smallest_step = min(rank_step * dimensions.rank_parameters, width_cost)
    tolerance = max(RELATIVE_TOLERANCE * (1 - keep_ratio) * total, smallest_step)

    # Rank steps as near the ideal as leaves what widths can take up.
    ideal_ranks = [w * dimensions.head_dim / rank_step for w in pruned]
    totals = range(len(pruned), len(pruned) * most_ranks + 1)
    for rank_total in sorted(totals, key=lambda n: abs(n - math.fsum(ideal_ranks))):
        rank_steps = largest_remainder(ideal_ranks, rank_total, most_ranks)
        rest = keep_ratio * total - whole - sum(rank_costs[n] for n in rank_steps)
        width_total = min(max(round(rest / width_cost), len(pruned)), len(pruned) * most_widths)
        if abs(rest - width_total * width_cost) <= tolerance:
            ranks, widths = iter(rank_steps), iter(largest_remainder(pruned, width_total, most_widths))
            return [
                dimensions.kept(w, next(ranks) * rank_step, next(widths) * width_step, prune_qk)
                if w < 1
                else whole_layer
                for w in keep
            ]
    costs = (rank_costs[most_ranks] + most_widths * width_cost, rank_costs[1] + width_cost)
    least, most = (100 * (1 - (whole + len(pruned) * cost) / total) for cost in costs)
    raise InputError(
        f"ranks in steps of {rank_step} and MLP widths in steps of {width_step} cannot remove "
        f"{100 * (1 - keep_ratio):g} % of this model; they can remove {least:.1f} to {most:.1f} %"
    )


def width_step_for(dimensions: ModelDimensions, rank_step: int) -> int:
    """Return the step of MLP widths: 64 channels where that is cheap, else ``rank_step``."""
    is_cheap = WIDE_STEP * dimensions.width_parameters < WIDE_STEP_SHARE * dimensions.layer_parameters
    return WIDE_STEP if WIDE_STEP % rank_step == 0 and is_cheap else rank_step


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
