"""Steps 4 and 6 of the method: head-wise PCA of what the attention's projections put out.

That of the values is absorbed into ``v_proj`` and ``o_proj``. That of queries and of keys leaves two factors of
``q_proj`` and of ``k_proj``, between whose products the rotary embedding stands. ``flatllm+`` chooses bases of the
values by what ``o_proj`` makes of them, from the moment ``Σ z zᵀ``, (H·d, H·d), of what enters it.

Shapes: D hidden size, H query heads, G key/value heads, d head width, r rank. Multi-head attention is G = H.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from .refit import solved_with_least

_RIDGES = (1e-9, 1e-6, 1e-4, 1e-2)  # tried in turn


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
