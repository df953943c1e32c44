"""How much each part of each layer keeps, from measured curves of the damage that removing weights does.

A curve is a list of (weights removed, damage), from (0, 0) on, for one kind of weights of one layer: V and O, the MLP,
or rotary pairs of Q and K. All are in one unit, nats, so that weights go where they cost least.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple, TypeAlias

from ..errors import InputError
from ..utils.dimensions import Kept, ModelDimensions, check_length
from .rank_rounding import Ideal

Curve: TypeAlias = list[tuple[float, float]]
Curves: TypeAlias = dict[str, Curve]  # of one layer, by kind
VALUES, MLP, PAIRS = "values", "mlp", "pairs"  # the kinds
# Where curves are measured, as shares of a head's width that stay.
_VALUE_SHARES = (15 / 16, 7 / 8, 3 / 4, 5 / 8, 1 / 2, 3 / 8, 1 / 4)
_PAIR_SHARES = (7 / 8, 3 / 4, 5 / 8, 1 / 2)
_MLP_SHARE = 0.9  # of the channels, that the curve of the MLP removes
_FLAT = 1e-12  # of the steepest slope: no piece is flatter, so that what costs nothing is shared by layers as well
_HALVINGS = 200  # of a bisection: more than tell any two levels apart in float64, flat ones too


def measured_at(dimensions: ModelDimensions) -> tuple[list[int], list[int], int]:
    """Return where a layer's curves are measured: value ranks and rotary pairs that stay, falling, channels removed."""
    width = dimensions.head_dim
    ranks = dict.fromkeys(max(1, int(share * width)) for share in _VALUE_SHARES)
    pairs = dict.fromkeys(max(1, int(share * width / 2)) for share in _PAIR_SHARES)
    return list(ranks), list(pairs), round(_MLP_SHARE * dimensions.intermediate_size)


class _Piece(NamedTuple):
    """A straight piece of a layer's convex curve."""

    slope: float  # damage per weight
    kind: str
    weights: float


def removed_by_curves(curves: Sequence[Mapping[str, Curve]], removed: float) -> list[dict[str, float]]:
    """Return the weights of each kind to remove from each layer, ``removed`` in all, or all that the curves have.

    They make the sum over layers of ``√x_l D_l(x_l)`` the least, ``D_l`` of the ``x_l`` weights that a layer loses by
    pieces of the convex hulls of its curves in the order of their slope. The sum of damages alone would take all from a
    layer before another loses any, on differences that curves of single layers do not tell (docs/ACCURACY_LOG.md).
    """
    layers = [sorted(piece for kind, curve in layer.items() for piece in _pieces(kind, curve)) for layer in curves]
    steepest = max((piece.slope for pieces in layers for piece in pieces), default=0.0) or 1.0
    layers = [[piece._replace(slope=max(piece.slope / steepest, _FLAT)) for piece in pieces] for pieces in layers]
    low, high = 0.0, max(map(_highest_level, layers))
    for _ in range(_HALVINGS):
        level = (low + high) / 2
        taken = sum(sum(_taken(pieces, level).values()) for pieces in layers)
        low, high = (level, high) if taken < removed else (low, level)
    return [dict.fromkeys(layer, 0.0) | _taken(pieces, high) for layer, pieces in zip(curves, layers, strict=True)]


def _taken(pieces: Sequence[_Piece], level: float) -> dict[str, float]:
    """Return what a layer loses of each kind until one weight more costs ``level``, the derivative of ``√x D(x)``."""
    taken: dict[str, float] = {}
    weights = damage = 0.0
    for slope, kind, most in pieces:
        # D is straight from here on: slope · √x + D(x) / (2 √x) is the level where √x solves a quadratic equation.
        at_none = damage - slope * weights  # where the straight line begins
        root = (level + math.sqrt(max(level**2 - 3 * slope * at_none, 0.0))) / (3 * slope)
        amount = min(max(root**2 - weights, 0.0), most)
        taken[kind] = taken.get(kind, 0.0) + amount
        weights += amount
        damage += slope * amount
    return taken


def _highest_level(pieces: Sequence[_Piece]) -> float:
    """Return the level at which a layer loses all that its curves have."""
    root, damage = math.sqrt(sum(of.weights for of in pieces)), sum(of.slope * of.weights for of in pieces)
    return pieces[-1].slope * root + damage / (2 * root) if pieces else 0.0


def scaled(curves: Mapping[str, Curve], by: float) -> Curves:
    """Return the curves of a layer in another unit of damage."""
    return {kind: [(removed, by * damage) for removed, damage in curve] for kind, curve in curves.items()}


def outlines(dimensions: ModelDimensions, can_lose_pairs: Sequence[bool]) -> list[Curves]:
    """Return how far the curves of each layer will go, which can lose rotary pairs or not, without their damage."""
    ranks, pairs, channels = measured_at(dimensions)
    per_direction = dimensions.rank_parameters
    values = (dimensions.head_dim - ranks[-1]) * per_direction
    turned = (dimensions.head_dim - 2 * pairs[-1]) * per_direction
    mlp = channels * dimensions.width_parameters
    return [{VALUES: [(values, 0)], MLP: [(mlp, 0)], PAIRS: [(turned * can, 0)]} for can in can_lose_pairs]


def check_curves(curves: Sequence[Curves], dimensions: ModelDimensions) -> None:
    """Refuse curves that are not of this model, or not from (0, 0) on by rising, finite numbers."""
    check_length("curves", curves, dimensions.num_layers)
    for index, layer in enumerate(curves):
        for kind, curve in layer.items():
            removed, damages = [point[0] for point in curve], [point[1] for point in curve]
            is_sound = curve[:1] == [(0, 0)] and all(map(math.isfinite, damages)) and min(damages) >= 0
            if not is_sound or removed != sorted(set(removed)):
                raise InputError(f"the curve {kind!r} of layer {index} is no curve of damage from (0, 0) on")
        if sum(curve[-1][0] for curve in layer.values()) > dimensions.layer_parameters:
            raise InputError(f"the curves of layer {index} remove more than it has")
        if layer.keys() - {VALUES, MLP, PAIRS}:
            raise InputError(f"layer {index} has curves of {', '.join(layer)}; known: {VALUES}, {MLP}, {PAIRS}")


def ideal_without(dimensions: ModelDimensions, taken: Mapping[str, float], rank_step: int) -> Ideal:
    """Return what a layer is to keep that loses so many weights of each kind; rotary pairs go in whole steps."""
    half, pair_step = dimensions.head_dim // 2, max(1, rank_step // 2)
    pairs = half - taken.get(PAIRS, 0.0) / (2 * dimensions.rank_parameters)
    left = min(max(round(pairs / pair_step), 1), half // pair_step) * pair_step

    def kept_with(rank: int, width: int) -> Kept:
        kept = Kept(1.0, rank, width, query_key_pairs=None if half in (pairs, left) else left)
        return replace(kept, keep=dimensions.parameters_of(kept) / dimensions.layer_parameters)

    rank = dimensions.head_dim - taken.get(VALUES, 0.0) / dimensions.rank_parameters
    width = dimensions.intermediate_size - taken.get(MLP, 0.0) / dimensions.width_parameters
    return Ideal(rank, width, kept_with)


def _pieces(kind: str, curve: Curve) -> Iterator[_Piece]:
    """Yield the pieces of the lower convex hull of a curve, each as damaging as what is removed before it at least."""
    hull: list[tuple[float, float]] = []
    for removed, damage in sorted(curve):
        point = (removed, max(damage, hull[-1][1] if hull else 0.0))
        while len(hull) >= 2 and _slope(hull[-2], hull[-1]) >= _slope(hull[-2], point):
            hull.pop()
        hull.append(point)
    for before, after in pairwise(hull):
        yield _Piece(_slope(before, after), kind, after[0] - before[0])


def _slope(a: tuple[float, float], b: tuple[float, float]) -> float:
    return (b[1] - a[1]) / (b[0] - a[0])
