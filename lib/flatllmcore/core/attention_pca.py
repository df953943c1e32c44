"""Steps 4 and 6 of the method: head-wise PCA of what the attention's projections put out.

That of the values is absorbed into ``v_proj`` and ``o_proj``. That of queries and of keys leaves two factors of
``q_proj`` and of ``k_proj``, between whose products the rotary embedding stands.

Shapes: D hidden size, H query heads, G key/value heads, d head width, r rank. Multi-head attention is G = H.
"""

import torch
from torch import Tensor, nn


def headwise_pca(second_moment: Tensor) -> tuple[Tensor, Tensor]:
    """Return eigenvalues, falling, (G, d), and their orthonormal columns, (G, d, d), of a float64 ``Σ v vᵀ``."""
    eigenvalues, directions = torch.linalg.eigh(second_moment)
    return eigenvalues.flip(-1), directions.flip(-1)


def project_heads(weight: Tensor, bases: Tensor) -> Tensor:
    """Return ``Q̃_gᵀ W^g`` of every head, float64, (G·r, D), for a weight (G·d, D) and bases (G, d, r).

    A bias, (G·d,), becomes (G·r,).
    """
    num_heads, head_dim, _ = bases.shape
    per_head = weight.double().view(num_heads, head_dim, -1)  # (G, d, D or 1)
    return (bases.mT @ per_head).reshape(-1, *weight.shape[1:])


def heads_projected(projection: nn.Module, name: str, bases: Tensor) -> dict[str, Tensor]:
    """Return a projection's weight, and its bias if it has one, by :func:`project_heads`, as parts of ``name``."""
    return {f"{name}.{of}": project_heads(parameter, bases) for of, parameter in projection.named_parameters()}


def project_output(o_weight: Tensor, bases: Tensor) -> Tensor:
    """Return ``W_o^h Q̃_g`` of every query head ``h`` of group ``g``, float64, (D, H·r), for (D, H·d) and (G, d, r)."""
    num_kv_heads, head_dim, _ = bases.shape
    per_head = o_weight.double().unflatten(1, (num_kv_heads, -1, head_dim))  # (D, G, n, d)
    return torch.einsum("DGnd,Gdr->DGnr", per_head, bases).flatten(1)


def rank_for_mass(eigenvalues: Tensor, tolerance: float) -> float:
    """Return the mean over heads of the smallest rank that keeps ``tolerance`` of the eigenvalues, falling, (G, d)."""
    mass = eigenvalues.clamp(min=0).cumsum(-1)
    # A head whose values are all zero needs no direction at all; the comparison counts none for it.
    short = mass < tolerance * mass[:, -1:] * (1 - 1e-12)  # the last sum may round below its own share
    ranks = short.sum(-1) + (mass[:, -1] > 0)
    return ranks.double().mean().item()
