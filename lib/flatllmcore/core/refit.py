"""Least-squares refits of ``flatllm+``: a weight is led towards a target, with a ridge chosen on held-out tokens.

Moments are float64 sums over tokens: ``C = Σ f fᵀ`` of features, ``R = Σ t fᵀ`` of targets and features. A ridge is
relative to the mean of ``C``'s diagonal.
"""

import torch
from torch import Tensor

RIDGES = (1e-2, 1e-3, 1e-1, 1e-4, 1.0)  # the first where held-out tokens tell none apart


def with_ridge(moment: Tensor, ridge: float) -> Tensor:
    """Return ``C + ridge · mean(diag C) · I`` of a moment (n, n)."""
    damped = moment.clone()
    damped.diagonal().add_(ridge * moment.diagonal().mean().clamp(min=torch.finfo(moment.dtype).tiny))
    return damped


def solved_from_right(moment: Tensor, cross: Tensor) -> Tensor:
    """Return ``R C⁻¹`` of a moment (n, n) and a cross moment (m, n); ArithmeticError if it is not positive definite."""
    factor = _factor(moment)
    halfway = torch.linalg.solve_triangular(factor.mT, cross, upper=True, left=False)
    return torch.linalg.solve_triangular(factor, halfway, upper=False, left=False)


def inverted(moment: Tensor) -> Tensor:
    """Return ``C⁻¹`` of a moment (n, n); ArithmeticError if it is not positive definite."""
    return torch.cholesky_inverse(_factor(moment))


def change_towards(weight: Tensor, moment: Tensor, cross: Tensor, ridge: float) -> Tensor:
    """Return ``(R - W C)(C + ridge)⁻¹``, (m, n), what to add to ``W``: little where the tokens say little."""
    return solved_from_right(with_ridge(moment, ridge), cross - weight @ moment)


def led_towards(weight: Tensor, fit: tuple[Tensor, Tensor], held_out: tuple[Tensor, Tensor], share: float) -> Tensor:
    """Return ``weight``, (m, n), led by ``share`` of the way to the least-squares fit of a target.

    ``fit`` and ``held_out`` are ``C`` and ``R`` of the tokens to fit and of those to check with. The ridge is the one
    whose fit gains most on the latter, ``2 ⟨Δ, R - W C⟩ - ⟨Δ C, Δ⟩`` for a change ``Δ``; then all tokens are fitted.
    """
    rest = held_out[1] - weight @ held_out[0]

    def gain(ridge: float) -> float:
        change = share * change_towards(weight, *fit, ridge)
        return (2 * (change * rest).sum() - ((change @ held_out[0]) * change).sum()).item()

    moment, cross = (part + held for part, held in zip(fit, held_out, strict=True))
    return weight + share * change_towards(weight, moment, cross, max(RIDGES, key=gain))


def _factor(moment: Tensor) -> Tensor:
    factor, failed_at = torch.linalg.cholesky_ex(moment)
    if failed_at.item():
        raise ArithmeticError("a moment of the calibration tokens is not positive definite")
    return factor
