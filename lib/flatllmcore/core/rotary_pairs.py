"""Which rotary pairs of queries and keys stay: those whose products are largest.

The two entries of a pair turn by one angle; they stand half a head apart. Shapes: H query heads, G key/value heads, d
head width.
"""

import sys

import torch
from torch import Tensor

from ..utils.devices import at_least_float32
from ..utils.layer_utils import DecoderModule


def pairs_are_halves(attention: DecoderModule) -> bool:
    """Tell whether the two entries of a rotary pair stand half a head apart, and not side by side."""
    of_family = getattr(attention, "dense", None) or sys.modules[type(attention).__module__]
    return bool(of_family.rotate_half(torch.arange(4))[0] == -2)


def has_free_pairs(attention: DecoderModule) -> bool:
    """Tell whether a dense attention can lose pairs: it turns them, half a head apart, and no norm looks at all."""
    is_normed = hasattr(attention, "q_norm") or hasattr(attention, "query_layernorm")
    return bool(getattr(attention, "use_rope", True) and pairs_are_halves(attention) and not is_normed)


def pair_energies(outputs: Tensor, head_dim: int) -> Tensor:
    """Return the energy of each rotary pair of each head, (heads, d / 2), in queries or keys (tokens, heads·d)."""
    pairs = at_least_float32(outputs).view(len(outputs), -1, 2, head_dim // 2)
    return pairs.square().sum((0, 2), dtype=torch.float64)


def without_pairs(attention: DecoderModule, queries: Tensor, keys: Tensor, left: int) -> dict[str, Tensor]:
    """Return the weights of Q and K with ``left`` rotary pairs in each head.

    Of each group those pairs stay whose product of energies, ``queries`` (H, d / 2), summed over the group, and
    ``keys`` (G, d / 2), is largest. ``rotary_places``, (G, 2·left), says where they stood.
    """
    num_kv_heads, half = keys.shape
    energies = queries.unflatten(0, (num_kv_heads, -1)).sum(1) * keys
    pairs = energies.argsort(descending=True, stable=True)[:, :left].sort().values
    places = torch.cat([pairs, pairs + half], 1)
    kept = {"self_attn.rotary_places": places}
    for name, heads in (("q_proj", len(queries)), ("k_proj", num_kv_heads)):
        starts = 2 * half * torch.arange(heads, device=places.device)
        rows = (places.repeat_interleave(heads // num_kv_heads, 0) + starts[:, None]).flatten()
        for of, part in attention.get_submodule(name).named_parameters():
            kept[f"self_attn.{name}.{of}"] = part[rows]
    return kept
