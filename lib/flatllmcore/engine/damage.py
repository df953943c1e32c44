"""What removing weights of a dense layer does to the stream behind it, as curves that ranks are allocated by.

Damage is the mean over tokens of ``‖y' - y‖² / ‖y‖²`` of the stream ``y`` behind the part of the layer: token by token,
since all that reads the stream sees it at one length.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from ..core.channel_obs import channels_by_damage
from ..core.curve_allocation import MLP, MLP_SHARE, PAIR_SHARES, PAIRS, VALUE_SHARES, VALUES, Curves
from ..core.moments import add_moment, inverse_length, mirror_lower_triangle
from ..core.output_pca import lost_by_rank
from ..core.rotary_pairs import has_free_pairs, pair_energies, without_pairs
from ..layers import replacement
from ..utils.dimensions import Kept
from ..utils.layer_utils import DecoderModule, dimensions_from_config
from ..utils.processes import all_reduce, own_share
from ..utils.stopwatch import stage
from .protocols import zero_sums
from .walk import Walk, forward_of

QUERIES, KEYS = "self_attn.q_proj.output", "self_attn.k_proj.output"
ATTENDED, CHANNELS = "self_attn.o_proj.input", "mlp.down_proj.input"
MIDDLE = "post_attention_layernorm.input"  # the stream between attention and MLP
TRIED_TOKENS = 2048  # that fewer rotary pairs are tried on, whose damage has no closed form


class LayerDamage:
    """The curves of one layer at its place in a walk, from what passes its taps."""

    taps = (QUERIES, KEYS, ATTENDED, MIDDLE, CHANNELS)

    def __init__(self, walk: Walk, layer: DecoderModule, index: int) -> None:
        self.walk, self.layer, self.index = walk, layer, index
        self.dimensions = sizes = dimensions_from_config(walk.source.config)
        tried = torch.arange(walk.count) * walk.windows.shape[1] < TRIED_TOKENS  # the first windows of all
        self._tried = walk.states[own_share(tried, walk.batch_size)]
        shapes = {ATTENDED: (sizes.num_heads * sizes.head_dim,) * 2, CHANNELS: (sizes.intermediate_size,) * 2}
        shapes |= {QUERIES: (sizes.num_heads, sizes.head_dim // 2), KEYS: (sizes.num_kv_heads, sizes.head_dim // 2)}
        self._sums = zero_sums(layer, shapes)

    def add(self, seen: Mapping[str, Tensor]) -> None:
        """Add a batch: what passed each tap, (tokens, width)."""
        with stage("moments"):
            output = seen[MIDDLE] + self.layer.mlp.down_proj.forward(seen[CHANNELS])  # not called: it may be looked at
            for features, stream in ((ATTENDED, seen[MIDDLE]), (CHANNELS, output)):
                add_moment(self._sums[features], seen[features] * inverse_length(stream))
            for tap in (QUERIES, KEYS):
                self._sums[tap] += pair_energies(seen[tap], self.dimensions.head_dim)

    def curves(self) -> Curves:
        """Return the curves of values and MLP from the moments, and of pairs by trying them."""
        sizes, layer = self.dimensions, self.layer
        tokens = self.walk.count * self.walk.windows.shape[1]
        energy = tokens * sizes.hidden_size
        with stage("reduce"):
            for total in self._sums.values():
                all_reduce(total)
        for name in (ATTENDED, CHANNELS):
            mirror_lower_triangle(self._sums[name])
        with stage("solves"):
            ranks = dict.fromkeys(max(1, int(share * sizes.head_dim)) for share in VALUE_SHARES)
            heads = (sizes.num_kv_heads, sizes.head_dim)
            lost = lost_by_rank(self._sums[ATTENDED], layer.self_attn.o_proj.weight, *heads, ranks)
            removed = round(MLP_SHARE * sizes.intermediate_size)
            _, damages = channels_by_damage(layer.mlp.down_proj.weight, self._sums[CHANNELS], removed, tokens)
        left = dict.fromkeys(max(1, int(share * sizes.head_dim / 2)) for share in PAIR_SHARES)
        if not has_free_pairs(layer.self_attn):
            left = {}
        tried = [((sizes.head_dim - 2 * n) * sizes.rank_parameters, self._damage_of_pairs(n)) for n in left]
        return {
            VALUES: [((sizes.head_dim - rank) * sizes.rank_parameters, of / energy) for rank, of in lost.items()],
            MLP: [(count * sizes.width_parameters, of / energy) for count, of in damages],
            PAIRS: [(0, 0.0), *tried],
        }

    def _damage_of_pairs(self, left: int) -> float:
        """Return the damage of an attention with so many rotary pairs per head, on a few tokens."""
        walk, layer, sizes = self.walk, self.layer, self.dimensions
        kept = Kept(1.0, sizes.head_dim, sizes.intermediate_size, None, left)
        config = replacement.compressed_config(walk.source.config, [kept] * sizes.num_layers)
        weights = without_pairs(layer.self_attn, self._sums[QUERIES], self._sums[KEYS], left)
        changed = replacement.compress_decoder_layer(layer, config, self.index, weights, "self_attn")
        dense = layer.self_attn
        total = torch.zeros(2, dtype=torch.float64, device=walk.source.device)
        for states in self._tried.split(walk.batch_size) if len(self._tried) else ():
            streams = []
            for layer.self_attn in (changed, dense):
                forward = forward_of(layer, "self_attn")
                streams.append(walk.run(forward, self.index, states.to(walk.source.device)).double())
            difference = (streams[0] - streams[1]).square().sum(-1) / streams[1].square().sum(-1)
            total += torch.stack([difference.sum(), torch.ones_like(difference).sum()])
        all_reduce(total)
        return (total[0] / total[1]).item()
