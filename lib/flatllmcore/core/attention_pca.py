"""Step 4 of the method: head-wise PCA of the values, absorbed into ``v_proj`` and ``o_proj``.

Shapes: D hidden size, H query heads, G key/value heads, d head width, r rank. Multi-head attention is G = H.
"""

import torch
from torch import Tensor


def headwise_pca(second_moment: Tensor) -> tuple[Tensor, Tensor]:
    """Return eigenvalues and principal directions of each key/value head, largest first.

    Args:
        second_moment: Sum of ``v vᵀ`` over calibration tokens, float64, (G, d, d).

    Returns:
        Eigenvalues (G, d), falling, and orthonormal columns (G, d, d), both float64.

    Raises:
        ValueError: If a moment is not finite.
    """
    if not torch.isfinite(second_moment).all():
        heads = (~torch.isfinite(second_moment)).flatten(1).any(1).nonzero().flatten().tolist()
        raise ValueError(f"the value moment of key/value heads {heads} is not finite")
    eigenvalues, directions = torch.linalg.eigh(second_moment)
    return eigenvalues.flip(-1), directions.flip(-1)


def project_values(v_weight: Tensor, bases: Tensor) -> Tensor:
    """Return ``Q̃_gᵀ W_v^g`` for every key/value head.

    Args:
        v_weight: ``v_proj``'s weight (G·d, D), or its bias as a column (G·d, 1).
        bases: Leading directions per head, float64, (G, d, r).

    Returns:
        float64, (G·r, D) or (G·r, 1).
    """
    num_kv_heads, head_dim, _ = bases.shape
    per_head = v_weight.double().view(num_kv_heads, head_dim, -1)  # (G, d, D)
    return (bases.mT @ per_head).flatten(0, 1)


def project_output(o_weight: Tensor, bases: Tensor) -> Tensor:
    """Return ``W_o^h Q̃_g`` for every query head ``h`` of group ``g``.

    Args:
        o_weight: ``o_proj``'s weight, (D, H·d).
        bases: Leading directions per key/value head, float64, (G, d, r).

    Returns:
        float64, (D, H·r).
    """
    num_kv_heads, head_dim, _ = bases.shape
    per_head = o_weight.double().view(len(o_weight), num_kv_heads, -1, head_dim)  # (D, G, n, d)
    return torch.einsum("DGnd,Gdr->DGnr", per_head, bases).flatten(1)


def rank_for_mass(eigenvalues: Tensor, tolerance: float) -> float:
    """Return the mean over heads of the smallest rank that keeps ``tolerance`` of the eigenvalue mass.

    Args:
        eigenvalues: Per head, falling, (G, d).
        tolerance: Share of the sum to keep, in (0, 1].
    """
    mass = eigenvalues.clamp(min=0).cumsum(-1)
    # A head whose values are all zero needs no direction at all; the comparison counts none for it.
    short = mass < tolerance * mass[:, -1:] * (1 - 1e-12)  # the last sum may round below its own share
    ranks = short.sum(-1) + (mass[:, -1] > 0)
    return ranks.double().mean().item()
