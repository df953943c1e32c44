"""Ranks and MLP widths in steps that hardware likes, at the exact parameter budget."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import InputError
from ..utils.layer_utils import ModelDimensions

RELATIVE_TOLERANCE = 0.001  # parameters removed, against the target
WIDE_STEP = 64  # MLP channels that matrix units like best
WIDE_STEP_SHARE = 0.005  # of a layer's parameters: what a wide step may cost


def attention_parameters(dimensions: ModelDimensions, rank: int, prune_qk: bool) -> int:
    """Return the weights of Q, K, V and O of one layer at one rank per head."""
    qk_rank = query_key_rank(dimensions, rank) if prune_qk else None
    qk_parameters = dimensions.qk_parameters if qk_rank is None else qk_rank * factor_parameters(dimensions)
    return qk_parameters + rank * dimensions.rank_parameters


def query_key_rank(dimensions: ModelDimensions, rank: int) -> int | None:
    """Return the rank at which pruned Q and K are kept, or ``None`` for whole ones.

    They are two factors, (rank, D) and (d, rank) per head; where those would not be fewer weights than
    the projections themselves, these are left whole.
    """
    return rank if rank * factor_parameters(dimensions) < dimensions.qk_parameters else None


def factor_parameters(dimensions: ModelDimensions) -> int:
    """Return what one unit of rank costs in the two factors of Q and of K."""
    return (dimensions.hidden_size + dimensions.head_dim) * (dimensions.num_heads + dimensions.num_kv_heads)


def rounded_ranks(
    dimensions: ModelDimensions, keep: Sequence[float], keep_ratio: float, rank_step: int, prune_qk: bool
) -> tuple[list[int], list[int]]:
    """Return value ranks and MLP widths in whole steps that keep ``keep_ratio`` of the decoder layers' weights.

    Widths move in steps of 64 channels where that is cheap, else of ``rank_step``. Layers with ``w = 1``
    stay whole; the others keep at least one step and at most as many as fit. The parameters removed are
    within 0.1 % of the target, or one step of the smaller kind where that is more.

    Raises:
        InputError: If no whole steps come that near to the target.
    """
    pruned = [layer_idx for layer_idx, w in enumerate(keep) if w < 1]
    steps = _Steps(dimensions, rank_step, width_step(dimensions, rank_step), prune_qk)
    total = len(keep) * dimensions.layer_parameters
    whole = (len(keep) - len(pruned)) * dimensions.layer_parameters
    tolerance = max(RELATIVE_TOLERANCE * (1 - keep_ratio) * total, steps.smallest_parameters)
    fitting = _fitting_steps(steps, [keep[i] for i in pruned], keep_ratio * total - whole, tolerance)
    if fitting is None:
        least, most = (100 * (1 - (whole + kept) / total) for kept in reversed(steps.parameter_range(len(pruned))))
        raise InputError(
            f"ranks in steps of {steps.rank} and MLP widths in steps of {steps.width} cannot remove "
            f"{100 * (1 - keep_ratio):g} % of this model; they can remove {least:.1f} to {most:.1f} %, "
            "and a smaller rank multiple more"
        )
    ranks, widths = [dimensions.head_dim] * len(keep), [dimensions.intermediate_size] * len(keep)
    for layer_idx, rank_steps, width_steps in zip(pruned, *fitting, strict=True):
        ranks[layer_idx], widths[layer_idx] = rank_steps * steps.rank, width_steps * steps.width
    return ranks, widths


def width_step(dimensions: ModelDimensions, rank_step: int) -> int:
    is_wide_step_cheap = WIDE_STEP * dimensions.width_parameters < WIDE_STEP_SHARE * dimensions.layer_parameters
    return WIDE_STEP if WIDE_STEP % rank_step == 0 and is_wide_step_cheap else rank_step


def largest_remainder(ideal: Sequence[float], total: int, most: int) -> list[int]:
    """Return integers in ``1..most`` that sum to ``total``, as nearly proportional to ``ideal`` as they can be.

    ``total`` lies in ``len(ideal) .. len(ideal) · most``.
    """
    scale = total / math.fsum(ideal) if ideal else 1.0
    shares = [share * scale for share in ideal]
    steps = [min(max(math.floor(share), 1), most) for share in shares]
    missing = total - sum(steps)
    direction = 1 if missing > 0 else -1
    for _ in range(abs(missing)):
        movable = [i for i, n in enumerate(steps) if 1 <= n + direction <= most]
        steps[max(movable, key=lambda i: direction * (shares[i] - steps[i]))] += direction
    return steps


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

    @property
    def smallest_parameters(self) -> int:
        return min(self.rank * self.dimensions.rank_parameters, self.width_parameters)

    def attention_parameters(self, rank_steps: Sequence[int]) -> int:
        return sum(attention_parameters(self.dimensions, n * self.rank, self.prune_qk) for n in rank_steps)

    def parameter_range(self, num_layers: int) -> tuple[int, int]:
        """Return the fewest and the most parameters that layers below ``w = 1`` can keep."""
        fewest = self.attention_parameters([1]) + self.width_parameters
        most = self.attention_parameters([self.most_ranks]) + self.most_widths * self.width_parameters
        return num_layers * fewest, num_layers * most


def _fitting_steps(
    steps: _Steps, keep: Sequence[float], budget: float, tolerance: float
) -> tuple[list[int], list[int]] | None:
    """Return the steps of rank and of width of each layer that spend the budget, or None.

    Tries the totals of rank steps from the ideal one outwards, until the widths can take up the rest.
    """
    num_layers = len(keep)
    ideal_ranks = [w * steps.dimensions.head_dim / steps.rank for w in keep]
    nearest_first = sorted(
        range(num_layers, num_layers * steps.most_ranks + 1), key=lambda n: abs(n - math.fsum(ideal_ranks))
    )
    for rank_total in nearest_first:
        rank_steps = largest_remainder(ideal_ranks, rank_total, steps.most_ranks)
        rest = budget - steps.attention_parameters(rank_steps)
        width_total = round(rest / steps.width_parameters)
        width_total = min(max(width_total, num_layers), num_layers * steps.most_widths)
        if abs(rest - width_total * steps.width_parameters) <= tolerance:
            return rank_steps, largest_remainder(keep, width_total, steps.most_widths)
    return None
