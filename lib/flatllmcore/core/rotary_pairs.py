"""Which rotary pairs of queries and keys stay: those whose products are largest.

The two entries of a pair turn by one angle; they stand half a head apart. Shapes: H query heads, G key/value heads, d
head width.
"""

import torch
from torch import Tensor


def pair_energies(outputs: Tensor, head_dim: int) -> Tensor:
    """Return the energy of each rotary pair of each head, (heads, d / 2), in queries or keys (tokens, heads·d)."""
    pairs = outputs.view(len(outputs), -1, 2, head_dim // 2)
    return pairs.square().sum((0, 2), dtype=torch.float64)


def rows_of_pairs(queries: Tensor, keys: Tensor, left: int) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Return the entries of each key/value head that stay, (G, 2·left), and the rows of Q and of K that hold them.

    Of each group those ``left`` pairs stay whose product of energies, ``queries`` (H, d / 2), summed over the group,
    and ``keys`` (G, d / 2), is largest.
    """
    num_kv_heads, half = keys.shape
    energies = queries.unflatten(0, (num_kv_heads, -1)).sum(1) * keys
    pairs = energies.argsort(descending=True, stable=True)[:, :left].sort().values
    places = torch.cat([pairs, pairs + half], 1)
    rows = []
    for heads in (len(queries), num_kv_heads):
        starts = 2 * half * torch.arange(heads, device=places.device)
        rows.append((places.repeat_interleave(heads // num_kv_heads, 0) + starts[:, None]).flatten())
    return places, (rows[0], rows[1])
