"""How much each part of each layer keeps, from measured curves of the damage that removing weights does.

A curve is a list of (weights removed, damage), from (0, 0) on, for one kind of weights of one layer: V and O, the MLP,
or rotary pairs of Q and K. All are in one unit, so that weights go where they cost least.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TypeAlias

from ..errors import InputError
from ..utils.dimensions import Kept, ModelDimensions, check_length
from .rank_rounding import Ideal

Curve: TypeAlias = list[tuple[float, float]]
Curves: TypeAlias = dict[str, Curve]  # of one layer, by kind
VALUES, MLP, PAIRS = "values", "mlp", "pairs"  # the kinds
LEAST, MOST = 0.5, 1.5  # times the mean share, that a layer loses
# Where curves are measured, as shares of a head's width that stay.
VALUE_SHARES = (15 / 16, 7 / 8, 3 / 4, 5 / 8, 1 / 2, 3 / 8, 1 / 4)
PAIR_SHARES = (7 / 8, 3 / 4, 5 / 8, 1 / 2)
MLP_SHARE = 0.9  # of the channels, that the curve of the MLP removes


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
    """Return the weights of each kind to remove from each layer, ``removed`` in all, or all that the curves have.

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
    return taken


def ideals_by_curves(
    dimensions: ModelDimensions, curves: Sequence[Mapping[str, Curve]], keep_ratio: float, rank_step: int
) -> list[Ideal]:
    """Return what each layer is to keep by its curves so that ``keep_ratio`` of all linear weights stays."""
    removed = (1 - keep_ratio) * dimensions.num_layers * dimensions.layer_parameters
    taken = removed_by_curves(curves, removed, dimensions.layer_parameters)
    return [_ideal(dimensions, of_layer, max(1, rank_step // 2)) for of_layer in taken]


def outlines(dimensions: ModelDimensions, can_lose_pairs: Sequence[bool]) -> list[Curves]:
    """Return how far the curves of each layer will go, which can lose rotary pairs or not, without their damage."""
    head_dim, per_direction = dimensions.head_dim, dimensions.rank_parameters
    values = (head_dim - max(1, int(VALUE_SHARES[-1] * head_dim))) * per_direction
    pairs = (head_dim - 2 * max(1, int(PAIR_SHARES[-1] * head_dim / 2))) * per_direction
    channels = round(MLP_SHARE * dimensions.intermediate_size) * dimensions.width_parameters
    return [{VALUES: [(values, 0)], MLP: [(channels, 0)], PAIRS: [(pairs * can, 0)]} for can in can_lose_pairs]


def check_curves(curves: Sequence[Curves], dimensions: ModelDimensions) -> None:
    """Refuse curves that are not of this model, or not from (0, 0) on by rising, finite numbers."""
    check_length("curves", curves, dimensions.num_layers)
    for index, layer in enumerate(curves):
        for kind, curve in layer.items():
            removed, damages = [point[0] for point in curve], [point[1] for point in curve]
            is_sound = curve[:1] == [(0, 0)] and all(map(math.isfinite, damages)) and min(damages) >= 0
            if not is_sound or removed != sorted(set(removed)) or removed[-1] > dimensions.layer_parameters:
                raise InputError(f"the curve {kind!r} of layer {index} is no curve of damage from (0, 0) on")
        if layer.keys() - {VALUES, MLP, PAIRS}:
            raise InputError(f"layer {index} has curves of {', '.join(layer)}; known: {VALUES}, {MLP}, {PAIRS}")


def _ideal(dimensions: ModelDimensions, taken: Mapping[str, float], pair_step: int) -> Ideal:
    """Return what a layer is to keep that loses so many weights of each kind; rotary pairs go in whole steps."""
    half = dimensions.head_dim // 2
    pairs = half - taken.get(PAIRS, 0.0) / (2 * dimensions.rank_parameters)
    left = min(max(round(pairs / pair_step), 1), half // pair_step) * pair_step

    def kept_with(rank: int, width: int) -> Kept:
        kept = Kept(1.0, rank, width, query_key_pairs=None if pairs == half else left)
        return replace(kept, keep=dimensions.parameters_of(kept) / dimensions.layer_parameters)

    rank = dimensions.head_dim - taken.get(VALUES, 0.0) / dimensions.rank_parameters
    width = dimensions.intermediate_size - taken.get(MLP, 0.0) / dimensions.width_parameters
    return Ideal(rank, width, kept_with)


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
