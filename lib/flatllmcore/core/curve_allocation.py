"""How much each part of each layer keeps, from measured curves of the damage that removing weights does.

A curve is a list of (weights removed, damage), from (0, 0) on, for one kind of weights of one layer: ``values`` (V and
O), ``mlp`` or ``pairs`` (Q and K). All are in one unit, so that weights go where they cost least.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeAlias

from ..errors import InputError
from ..utils.dimensions import Kept, ModelDimensions
from .rank_rounding import RELATIVE_TOLERANCE, largest_remainder, width_step_for

Curve: TypeAlias = list[tuple[float, float]]
Curves: TypeAlias = dict[str, Curve]  # of one layer, by kind
LEAST, MOST = 0.5, 1.5  # times the mean share, that a layer loses


@dataclass(frozen=True, order=True)
class _Piece:
    """A straight piece of a layer's convex curve."""

    slope: float  # damage per weight
    layer: int
    kind: str
    weights: float


def removed_by_curves(
    curves: Sequence[Mapping[str, Curve]], removed: float, layer_parameters: int
) -> list[dict[str, float]]:
    """Return the weights of each kind to remove from each layer, ``removed`` in all.

    Pieces of the curves' lower convex hulls go in the order of their slope, first as many as each layer has to lose,
    half the mean, then those of all layers together, until a layer has lost one and a half times the mean.
    """
    taken = [dict.fromkeys(layer, 0.0) for layer in curves]
    mean = removed / len(curves)
    left = removed

    def take(piece: _Piece, most: float) -> float:
        nonlocal left
        amount = max(0.0, min(piece.weights, left, most - sum(taken[piece.layer].values())))
        taken[piece.layer][piece.kind] += amount
        left -= amount
        return piece.weights - amount

    most = min(MOST * mean, layer_parameters)
    pieces = sorted(piece for index, layer in enumerate(curves) for piece in _pieces(index, layer))
    for bound in (LEAST * mean, most, layer_parameters):  # the last where clipped layers have too little to give
        pieces = [
            _Piece(piece.slope, piece.layer, piece.kind, rest) for piece in pieces if (rest := take(piece, bound)) > 0
        ]
    if left > RELATIVE_TOLERANCE * removed:
        largest = 100 * (removed - left) / (len(curves) * layer_parameters)
        raise InputError(f"the curves of damage go as far as {largest:.1f} % of the weights; give a smaller target")
    return taken


def allocated_by_curves(
    dimensions: ModelDimensions, curves: Sequence[Mapping[str, Curve]], keep_ratio: float, rank_step: int
) -> list[Kept]:
    """Return what each layer keeps, in steps, so that ``keep_ratio`` of all linear weights stays."""
    total = dimensions.num_layers * dimensions.layer_parameters
    taken = removed_by_curves(curves, (1 - keep_ratio) * total, dimensions.layer_parameters)
    pair_step, width_step = max(1, rank_step // 2), width_step_for(dimensions, rank_step)
    head_dim, pairs_in_all = dimensions.head_dim, dimensions.head_dim // 2
    ranks = [head_dim - layer.get("values", 0.0) / dimensions.rank_parameters for layer in taken]
    pairs = [pairs_in_all - layer.get("pairs", 0.0) / (2 * dimensions.rank_parameters) for layer in taken]
    widths = [dimensions.intermediate_size - layer.get("mlp", 0.0) / dimensions.width_parameters for layer in taken]
    pair_steps = [min(max(round(n / pair_step), 1), pairs_in_all // pair_step) * pair_step for n in pairs]
    kept_pairs = [None if n == pairs_in_all else n for n in pair_steps]
    ideal_ranks = [rank / rank_step for rank in ranks]
    ideal_widths = [width / width_step for width in widths]
    width_cost = width_step * dimensions.width_parameters
    tolerance = max(RELATIVE_TOLERANCE * (1 - keep_ratio) * total, min(rank_step * dimensions.rank_parameters, width_cost))
    most_ranks, most_widths = head_dim // rank_step, dimensions.intermediate_size // width_step
    wanted = round(sum(ideal_ranks))
    for rank_total in sorted(range(len(taken), len(taken) * most_ranks + 1), key=lambda n: abs(n - wanted)):
        rank_steps = largest_remainder(ideal_ranks, rank_total, most_ranks)
        attention = [Kept(1.0, n * rank_step, 0, None, p) for n, p in zip(rank_steps, kept_pairs, strict=True)]
        rest = keep_ratio * total - sum(map(dimensions.parameters_of, attention))
        width_total = min(max(round(rest / width_cost), len(taken)), len(taken) * most_widths)
        if abs(rest - width_total * width_cost) <= tolerance:
            found = largest_remainder(ideal_widths, width_total, most_widths)
            layers = [Kept(1.0, of.value_rank, n * width_step, None, of.query_key_pairs) for of, n in zip(attention, found, strict=True)]
            share = [dimensions.parameters_of(of) / dimensions.layer_parameters for of in layers]
            return [Kept(s, of.value_rank, of.mlp_width, None, of.query_key_pairs) for s, of in zip(share, layers, strict=True)]
    raise InputError(f"steps of {rank_step} cannot remove {100 * (1 - keep_ratio):g} % of this model")


def _pieces(index: int, layer: Mapping[str, Curve]) -> list[_Piece]:
    """Return the pieces of the lower convex hulls of a layer's curves."""
    return [
        _Piece((after[1] - before[1]) / (after[0] - before[0]), index, kind, after[0] - before[0])
        for kind, curve in layer.items()
        for before, after in pairwise(_hull(curve))
    ]


def _hull(curve: Curve) -> list[tuple[float, float]]:
    """Return the lower convex hull of a curve that does not fall."""
    hull: list[tuple[float, float]] = []
    for removed, damage in sorted(curve):
        point = (removed, max(damage, hull[-1][1] if hull else 0.0))
        while len(hull) >= 2 and _slope(hull[-2], hull[-1]) >= _slope(hull[-2], point):
            hull.pop()
        hull.append(point)
    return hull


def _slope(a: tuple[float, float], b: tuple[float, float]) -> float:
    return (b[1] - a[1]) / (b[0] - a[0])
