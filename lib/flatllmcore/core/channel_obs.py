"""Which MLP channels to remove by the damage that is left when the others make up for it (structured OBS)."""

import torch
from torch import Tensor

from .refit import factored, solved_from_right, with_ridge

RIDGE = 0.1  # times channels per token: few tokens tell little of how channels make up for each other
ROUNDS = 32  # in which all channels would go: damages are updated between two


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
    left = torch.arange(len(moment), device=moment.device)
    curve = [(0, 0.0)]
    at_once = max(1, len(moment) // ROUNDS)
    while curve[-1][0] < removed:
        count = min(at_once, removed - curve[-1][0])
        order = (weight.square().sum(0) / inverse.diagonal()).argsort(stable=True)
        going, staying = order[:count], order[count:].sort().values
        coupling = inverse[going][:, staying]
        undone = solved_from_right(inverse[going][:, going], weight[:, going])
        damage = (weight[:, going] * undone).sum().item()
        weight = weight[:, staying] - undone @ coupling
        inverse = inverse[staying][:, staying] - solved_from_right(inverse[going][:, going], coupling.T) @ coupling
        left = left[staying]
        curve.append((curve[-1][0] + count, curve[-1][1] + damage))
    return left, curve
