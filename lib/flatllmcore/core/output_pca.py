"""Bases of the value heads by what the output projection makes of them, from moments taken after attention.

Shapes: D hidden size, H query heads, G key/value heads, d head width, r rank. ``moment``, (H·d, H·d), is ``Σ z zᵀ`` of
what enters ``o_proj``, whose weight is (D, H·d).
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from .attention_pca import project_output
from .refit import solved_with_least

_RIDGES = (1e-9, 1e-6, 1e-4, 1e-2)  # tried in turn


def output_bases(moment: Tensor, o_weight: Tensor, num_kv_heads: int, head_dim: int) -> Tensor:
    """Return orthonormal columns, the most important first, float64, (G, d, d), for the values of each key/value head.

    With ``C`` the sum of the moments of a group's query heads and ``S = Σ_h W_hᵀ W_h``, the first r columns span
    ``S^½ U`` with ``U`` the r leading eigenvectors of ``S^½ C S^½``: what costs the output least to lose is last.
    """
    per_head = o_weight.double().unflatten(1, (num_kv_heads, -1, head_dim))  # (D, G, n, d)
    metrics = torch.einsum("DGnd,DGne->Gde", per_head, per_head)
    blocks = moment.unflatten(0, (num_kv_heads, -1, head_dim)).unflatten(-1, (num_kv_heads, -1, head_dim))
    moments = torch.einsum("GndGne->Gde", blocks)  # of each head with itself, summed over a group
    eigenvalues, vectors = torch.linalg.eigh(metrics)
    roots = (vectors * eigenvalues.clamp(min=0).sqrt()[..., None, :]) @ vectors.mT  # symmetric
    leading = torch.linalg.eigh(roots @ moments @ roots)[1].flip(-1)
    return torch.linalg.qr(roots @ leading)[0]


def lost_by_rank(
    moment: Tensor, o_weight: Tensor, num_kv_heads: int, head_dim: int, ranks: Iterable[int]
) -> dict[int, float]:
    """Return the energy of ``o_proj``'s output that is lost at each rank, when its weight is refitted."""
    weight = o_weight.double()
    bases = output_bases(moment, weight, num_kv_heads, head_dim)
    crossed = weight @ moment
    energy = (crossed * weight).sum()
    lost = {head_dim: 0.0}
    for rank in ranks:
        leading = bases[..., :rank]
        cross, reduced = project_output(crossed, leading), project_output(project_output(moment, leading).T, leading)
        fitted = solved_with_least(_RIDGES, reduced, cross)
        lost[rank] = max(0.0, (energy - (fitted * cross).sum()).item())
    return lost
