"""Closed forms of ``flatllm+``: least-squares refits, and which channels go by the damage left after one (OBS).

A weight is led towards a target, with a ridge chosen on held-out tokens. Moments are float64 sums over tokens:
``C = Σ f fᵀ`` of features, ``R = Σ t fᵀ`` of targets and features. A ridge is relative to the mean of ``C``'s diagonal.
"""

from collections.abc import Sequence
from contextlib import suppress
from functools import cache

import torch
from torch import Tensor

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
SAMPLE = 4  # a ridge is tried on one row in four; by that two of 240 fits of SmolLM2 took another, both near ties
RIDGE = 0.1  # times channels per token: few tokens tell little of how channels make up for each other
ROUNDS = 32  # in which all channels would go: damages are updated between two


def with_ridge(moment: Tensor, ridge: float) -> Tensor:
    """Return ``C + ridge · mean(diag C) · I`` of a moment (n, n)."""
    damped = moment.clone()
    damped.diagonal().add_(ridge * moment.diagonal().mean().clamp(min=torch.finfo(moment.dtype).tiny))
    return damped


def factored(moment: Tensor) -> Tensor:
    """Return ``L`` with ``L Lᵀ = C``, (n, n), of a moment; ArithmeticError if it is not positive definite."""
    factor, failed_at = torch.linalg.cholesky_ex(moment)
    if failed_at.item():
        raise ArithmeticError("a moment of the calibration tokens is not positive definite")
    return factor


def solved_from_right(moment: Tensor, cross: Tensor) -> Tensor:
    """Return ``R C⁻¹`` of a moment (n, n) and a cross moment (m, n); ArithmeticError if it is not positive definite."""
    factor = factored(moment)
    halfway = torch.linalg.solve_triangular(factor.mT, cross, upper=True, left=False)
    return torch.linalg.solve_triangular(factor, halfway, upper=False, left=False)


def solved_with_least(ridges: Sequence[float], moment: Tensor, cross: Tensor) -> Tensor:
    """Return ``R (C + ridge)⁻¹`` with the first of the ridges by which a moment is positive definite.

    Float32 sums of few tokens make one that is not. ArithmeticError if the last is too small.
    """
    for ridge in ridges[:-1]:
        with suppress(ArithmeticError):
            return solved_from_right(with_ridge(moment, ridge), cross)
    return solved_from_right(with_ridge(moment, ridges[-1]), cross)


def led_towards(weight: Tensor, moments: Sequence[Tensor], crosses: Sequence[Tensor], share: float) -> Tensor:
    """Return ``weight``, (m, n), led by ``share`` of the way to the least-squares fit of a target.

    ``moments`` are ``C`` and ``crosses`` ``R`` of the tokens to fit and of those to check with. A fit changes ``W`` by
    ``Δ = (R - W C)(C + ridge)⁻¹``. The ridge is looked for from the middle one on, as long as the change gains more on
    the latter, ``2 ⟨Δ, R - W C⟩ - ⟨Δ C, Δ⟩``: the middle one where there are none. Every ``SAMPLE``-th row is
    enough to choose it, as all rows share one moment. Then all tokens are fitted.
    """
    rest, held_rest = (R - weight @ C for C, R in zip(moments, crosses, strict=True))

    @cache
    def gain(place: int) -> float:
        change = share * solved_from_right(with_ridge(moments[0], RIDGES[place]), rest[::SAMPLE])
        return (2 * (change * held_rest[::SAMPLE]).sum() - ((change @ moments[1]) * change).sum()).item()

    place = len(RIDGES) // 2
    for step in (1, -1):
        while 0 <= place + step < len(RIDGES) and gain(place + step) > gain(place):
            place += step
    both = with_ridge(moments[0] + moments[1], RIDGES[place])
    return weight + share * solved_from_right(both, rest + held_rest)


def ridge_for(tokens: int, channels: int) -> float:
    """Return the ridge for a moment summed over so many tokens, relative to the mean of its diagonal."""
    return RIDGE * channels / tokens


def channels_by_damage(
    weight: Tensor, moment: Tensor, removed: int, tokens: int
) -> tuple[Tensor, list[tuple[int, float]]]:
    """Return the channels that stay, rising, and the damage ``‖ΔW z‖²`` of each number removed on the way.

    ``weight`` is (D, F), times a metric's factor where errors are weighed, and ``moment`` ``Σ z zᵀ``, float64, (F, F).
    Channel ``j`` costs ``‖W_:j‖² / [H⁻¹]_jj`` with ``H = C + ridge``; those that cost least go, a 32nd of all at a
    time, and the weights and ``H⁻¹`` of the others make up for them.
    """
    ridge = ridge_for(tokens, len(moment))
    inverse, weight = torch.cholesky_inverse(factored(with_ridge(moment, ridge))), weight.double()
    gone = torch.zeros(len(moment), dtype=torch.bool, device=moment.device)
    curve = [(0, 0.0)]
    at_once = max(1, len(moment) // ROUNDS)
    while curve[-1][0] < removed:
        costs = (weight.square().sum(0) / inverse.diagonal()).masked_fill(gone, torch.inf)
        going = costs.argsort(stable=True)[: min(at_once, removed - curve[-1][0])]
        factor = factored(inverse[going][:, going])
        coupling = torch.linalg.solve_triangular(factor, inverse[going], upper=False)  # (k, F)
        undone = torch.linalg.solve_triangular(factor, weight[:, going].T, upper=False)  # (k, D)
        weight = torch.addmm(weight, undone.T, coupling, alpha=-1)
        inverse.addmm_(coupling.T, coupling, alpha=-1)  # rows and columns of those that go become zero
        gone[going] = True
        curve.append((curve[-1][0] + len(going), curve[-1][1] + undone.square().sum().item()))
    return (~gone).nonzero().flatten(), curve
