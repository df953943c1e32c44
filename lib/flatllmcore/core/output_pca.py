"""Bases of the value heads by what the output projection makes of them, from moments taken after attention.

Shapes: D hidden size, H query heads, G key/value heads, d head width, r rank.
"""

import torch
from torch import Tensor


def output_bases(moment: Tensor, o_weight: Tensor, num_kv_heads: int, head_dim: int, rank: int) -> Tensor:
    """Return orthonormal columns, float64, (G, d, r), for the values of each key/value head.

    ``moment``, (H·d, H·d), is ``Σ z zᵀ`` of what enters ``o_proj``, ``o_weight`` is (D, H·d). With ``C`` the sum of the
    moments of a group's query heads and ``S = Σ_h W_hᵀ W_h`` the columns span ``S^½ U`` with ``U`` the leading
    eigenvectors of ``S^½ C S^½``: the directions whose loss costs the output least.
    """
    per_head = o_weight.double().unflatten(1, (num_kv_heads, -1, head_dim))  # (D, G, n, d)
    metrics = torch.einsum("DGnd,DGne->Gde", per_head, per_head)
    blocks = moment.unflatten(0, (num_kv_heads, -1, head_dim)).unflatten(-1, (num_kv_heads, -1, head_dim))
    moments = torch.einsum("GndGne->Gde", blocks)  # of each head with itself, summed over a group
    roots = square_root(metrics)
    leading = torch.linalg.eigh(roots @ moments @ roots)[1].flip(-1)[..., :rank]
    return torch.linalg.qr(roots @ leading)[0]


def square_root(matrices: Tensor) -> Tensor:
    """Return the symmetric square roots of positive semidefinite matrices (..., n, n)."""
    eigenvalues, vectors = torch.linalg.eigh(matrices)
    return (vectors * eigenvalues.clamp(min=0).sqrt()[..., None, :]) @ vectors.mT
