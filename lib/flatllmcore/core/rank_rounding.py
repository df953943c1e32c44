"""Ranks and MLP widths in steps that hardware likes, at the exact parameter budget."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..errors import InputError
from ..utils.dimensions import Kept, ModelDimensions

RELATIVE_TOLERANCE = 0.001  # parameters removed, against the target
FLOAT_ROUNDING = 1e-12  # of a model's weights
WIDE_STEP = 64  # MLP channels that matrix units like best
WIDE_STEP_SHARE = 0.005  # of a layer's parameters: what a wide step may cost
INTEGER_GROUP = 32  # weights that share a scale in the narrowest of common 4-bit formats


@dataclass(frozen=True)
class Ideal:
    """What a layer is to keep before its sizes are whole steps."""

    rank: float  # directions per value head
    width: float  # MLP channels, or what is proportional to them
    kept_with: Callable[[int, int], Kept]  # what it keeps with a rank and a width in whole steps


def rounded_layers(
    dimensions: ModelDimensions, ideals: Sequence[Ideal], keep_ratio: float, rank_step: int, width_step: int
) -> list[Kept]:
    """Return layers whose ranks and MLP widths are whole steps and which keep ``keep_ratio`` of the linear weights.

    Layers keep at least one step and at most as many as fit. The parameters removed are within 0.1 % of the target for
    all layers of the model, or one step of the smaller kind where that is more; InputError if no steps come there.
    """
    most_ranks, most_widths = dimensions.head_dim // rank_step, dimensions.intermediate_size // width_step
    width_cost = width_step * dimensions.width_parameters
    total = dimensions.num_layers * dimensions.layer_parameters
    whole = (dimensions.num_layers - len(ideals)) * dimensions.layer_parameters
    tolerance = allowed_error(dimensions, (1 - keep_ratio) * total, rank_step, width_step)

    # Rank steps as near the ideal as leaves what widths can take up.
    ideal_ranks, ideal_widths = [of.rank / rank_step for of in ideals], [of.width for of in ideals]
    totals = range(len(ideals), len(ideals) * most_ranks + 1)
    for rank_total in sorted(totals, key=lambda n: abs(n - math.fsum(ideal_ranks))):
        rank_steps = largest_remainder(ideal_ranks, rank_total, most_ranks)
        attentions = (of.kept_with(n * rank_step, 0) for of, n in zip(ideals, rank_steps, strict=True))
        rest = keep_ratio * total - whole - sum(map(dimensions.parameters_of, attentions))
        width_total = min(max(round(rest / width_cost), len(ideals)), len(ideals) * most_widths)
        if abs(rest - width_total * width_cost) <= tolerance:
            width_steps = largest_remainder(ideal_widths, width_total, most_widths)
            sizes = zip(ideals, rank_steps, width_steps, strict=True)
            return [of.kept_with(rank * rank_step, width * width_step) for of, rank, width in sizes]
    steps = f"ranks in steps of {rank_step} and MLP widths in steps of {width_step}"
    raise InputError(f"{steps} remove {100 * (1 - keep_ratio):g} % only roughly; give another target or smaller steps")


def allowed_error(dimensions: ModelDimensions, removed: float, rank_step: int, width_step: int) -> float:
    """Return how many weights more or less than asked may be removed from a model: 0.1 %, or the smaller step.

    And what rounding may add: shares are in floating point.
    """
    smaller = min(rank_step * dimensions.rank_parameters, width_step * dimensions.width_parameters)
    rounding = FLOAT_ROUNDING * dimensions.num_layers * dimensions.layer_parameters
    return max(RELATIVE_TOLERANCE * removed, smaller) + rounding


def width_step_for(dimensions: ModelDimensions, rank_step: int) -> int:
    """Return the step of MLP widths where none is asked for: 64 channels where that is cheap, else ``rank_step``."""
    is_cheap = WIDE_STEP * dimensions.width_parameters < WIDE_STEP_SHARE * dimensions.layer_parameters
    return WIDE_STEP if WIDE_STEP % rank_step == 0 and is_cheap else rank_step


def rank_step_for(dimensions: ModelDimensions, rank_step: int, width_step: int) -> int:
    """Return a multiple of ``rank_step`` that leaves ``o_proj`` inputs that integers like, if ``width_step`` is one.

    Those are heads × rank, and divisible by 32 then, a group of quantised weights, as far as the dense ones are.
    """
    group = math.gcd(width_step, INTEGER_GROUP, dimensions.num_heads * dimensions.head_dim)
    return math.lcm(rank_step, group // math.gcd(group, dimensions.num_heads))


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
